"""The page's server: this machine only, a secret in every address, and nothing else to reach."""

from __future__ import annotations

import gzip
import hmac
import json
import secrets
import sys
import tempfile
import traceback
import webbrowser
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from plotly.offline import get_plotlyjs

from assay.explore.job import Desk, Order
from assay.explore.session import Session
from assay.explore.state import State
from assay.model.errors import InputError
from assay.report import page as report_page

HOST = "127.0.0.1"
MOST_BYTES = 1 << 18
SECONDS = 60
"""How long a silent connection is kept."""
TOKEN_HEADER = "X-Assay-Token"
HERE, REPORT = Path(__file__).parent, Path(report_page.__path__[0])
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Of the report, whose scripts stand in it: an origin of its own, which can ask nothing of this server."""
HTML = "text/html; charset=utf-8"
HEADERS = {
    "Cache-Control": "no-store", "Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip


class Server(ThreadingHTTPServer):
    """Serves one session under a secret address. engine, method: what the page starts with.

    Raises InputError for unknown names, and where the port is taken.
    """

    daemon_threads = True

    def __init__(self, session: Session, engine: str, method: str, port: int = 0) -> None:
        self.session, self.token, self.saving, self.desk = session, secrets.token_urlsafe(32), Lock(), Desk()
        facts = session.facts(engine, method)
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} can't be used ({error}); leave --port out to take a free one") from None
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.files = _files()
        self.reads: dict[str, Callable[[dict[str, str]], Any]] = {
            "facts": lambda q: facts,
            "setting": lambda q: session.setting(State.parse(q["state"])),
            "plan": lambda q: session.answer(State.parse(q["state"])),
            "cell": lambda q: session.cell(State.parse(q["state"]), q["block"], q["role"]),
            "compare": lambda q: session.compare(q["path"]),
            "job": lambda q: self.desk.to_json(),
        }
        self.writes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "save": self._save,
            "start": lambda w: self._start(Order(w["model"], w["plan"], w["out"], session.profile.folder)),
            "cancel": lambda w: self.desk.cancel(),
        }

    @property
    def address(self) -> str:
        """Where the page is; whoever knows it may use it."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def server_close(self) -> None:
        """Stop listening, and the compression that was started here."""
        super().server_close()
        self.desk.close()

    def _save(self, wanted: dict[str, Any]) -> dict[str, str]:
        if not isinstance(wanted["path"], str):
            raise InputError("name a file for the plan, like plan.yaml")
        with self.saving:
            saved = self.session.save(State.parse(json.dumps(wanted["state"])), wanted["path"]).absolute()
        return {
            "saved": str(saved),
            "command": f"assay compress MODEL --profile {self.session.profile.folder} --plan {saved} -o OUT",
        }

    def _start(self, order: Order) -> dict[str, Any]:
        self.desk.start(order)
        return self.desk.to_json()


class Handler(BaseHTTPRequestHandler):
    """GET shows, POST saves, starts and cancels; anything else is refused without a word about what there is."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "assay", ""
    timeout = SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """A file of the page, an answer as JSON, or the report of what was compressed here."""
        parts = self._admitted()
        if parts is None:
            return
        name, query = parts
        job = self.server.desk.job
        if name == "report" and job is not None and job.to_json()["report"]:
            return self._send(200, job.page.read_bytes(), HTML, {"Content-Security-Policy": REPORT_POLICY})
        if name in self.server.files:
            kind, body = self.server.files[name]
            packed = {"Content-Encoding": "gzip"} if name == "plotly.js" else {}
            return self._send(200, body, kind, packed)
        read = self.server.reads.get(name)
        if read is None:
            return self._refuse(404, "there is no such page")
        self._answer(lambda: read({key: values[-1] for key, values in parse_qs(query, keep_blank_values=True).items()}))

    def do_POST(self) -> None:
        """Save the plan of a state, start a compression or cancel it; the body is a JSON object."""
        self.close_connection = True
        parts = self._admitted()
        if parts is None:
            return
        write = self.server.writes.get(parts[0])
        if write is None:
            return self._refuse(404, "there is no such page")
        origin = self.headers.get("Origin")
        foreign = origin is not None and origin.partition("//")[2] not in self.server.hosts
        if foreign or not self._is_token(self.headers.get(TOKEN_HEADER, "")):
            return self._refuse(403, "not allowed")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self._refuse(411, "the length of the body is missing")
        if len(length) > 9 or int(length) > MOST_BYTES:
            return self._refuse(413, f"a body has at most {MOST_BYTES} bytes")
        body = self.rfile.read(int(length))
        self._answer(lambda: write(_object(body)))

    def _admitted(self) -> tuple[str, str] | None:
        """(page, query) of a request that came to the right name with the token; else it was refused."""
        if self.headers.get("Host", "") not in self.server.hosts:
            self._refuse(403, "not allowed")
            return None
        url = urlsplit(self.path)
        token, _, name = url.path.removeprefix("/").partition("/")
        if not url.path.startswith("/") or not self._is_token(token):
            self._refuse(403, "not allowed")
            return None
        return name, url.query

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode())

    def _answer(self, work: Callable[[], Any]) -> None:
        try:
            return self._send_json(200, work())
        except InputError as error:
            return self._refuse(400, " ".join(str(error).split()))
        except KeyError as error:
            return self._refuse(400, f"the request lacks {error}")
        except OSError as error:
            return self._refuse(400, f"{error.filename or 'the disk'}: {error.strerror}")
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return self._refuse(500, "assay failed; the terminal says where")

    def _refuse(self, code: int, why: str) -> None:
        self.close_connection = self.close_connection or code in (403, 411, 413)
        self._send_json(code, {"error": why})

    def _send_json(self, code: int, value: Any) -> None:
        self._send(code, json.dumps(value, separators=(",", ":")).encode(), "application/json", {})

    def _send(self, code: int, body: bytes, kind: str, more: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | HEADERS | more).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the window was closed
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: requests hold the token."""


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError("the request is no JSON object; load the page again")
    return value


def show(address: str) -> None:
    """Open an address in the browser, through a file that only this user reads: command lines can be seen by all."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False) as file:
        file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">')
    webbrowser.open(Path(file.name).as_uri())


@cache
def _files() -> dict[str, tuple[str, bytes]]:
    style = (REPORT / "page.css").read_bytes() + (HERE / "page.css").read_bytes()
    return {
        "": (HTML, (HERE / "page.html").read_bytes()),
        "page.css": ("text/css; charset=utf-8", style),
        "page.js": ("text/javascript; charset=utf-8", (HERE / "page.js").read_bytes()),
        "plotly.js": ("text/javascript; charset=utf-8", gzip.compress(get_plotlyjs().encode(), 6, mtime=0)),
    }
