"""Requests to the explorer's server, byte for byte as a test wants them."""

from __future__ import annotations

import http.client
import json

from assay.explore.server import TOKEN_HEADER, Server


def request(
    server: Server, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request; `path` is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None and "Content-Length" not in (headers or {}):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def get(server: Server, name: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    """The same under the server's own token."""
    return request(server, "GET", f"/{server.token}/{name}", None, headers)


def state(bits: float = 5.0, **more: object) -> dict[str, object]:
    """What a window sends."""
    return {"bits": bits, "engine": "transformers"} | more


def post(server: Server, value: object, name: str = "save", **headers: str) -> tuple[int, dict]:
    """Status and answer of what the page's own script would send."""
    sent = {TOKEN_HEADER: server.token} | {k.replace("_", "-"): v for k, v in headers.items()}
    code, _, body = request(server, "POST", f"/{server.token}/{name}", json.dumps(value).encode(), sent)
    return code, json.loads(body)
