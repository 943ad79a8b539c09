"""Who reaches the page, what a request can and can't do, and that saved plans are those of `assay plan`."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from cli.calls import call, one_line
from explore.asking import get, post, request, state

from assay.budget import agreement
from assay.budget.plan import Plan
from assay.explore.server import MOST_BYTES, TOKEN_HEADER, Server
from assay.explore.session import Session
from assay.explore.state import State
from assay.measure.profile import Profile
from assay.model.files import read_note, save_note


def test_it_listens_on_this_machine_only(server: Server) -> None:
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [a.ip for a in listening if a.port == server.server_port] == ["127.0.0.1"]
    assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert len(server.token) >= 40


def test_two_servers_have_two_tokens(serve: Callable[..., Server], profile: Path) -> None:
    first, second = serve(profile), serve(profile)
    assert first.token != second.token
    assert request(second, "GET", f"/{first.token}/facts")[0] == 403


def test_without_the_token_nothing_says_what_there_is(server: Server) -> None:
    """Every wrong address gets the same answer, whether the name behind it exists or not."""
    token = server.token
    wrong = ["/", "", "/facts", "/page.js", f"/{token[:-1]}/", f"/{token[:-1]}~/facts", f"/{token}x/facts", f"/x{token}/facts"]
    wrong += [f"/./{token}/facts", f"/{quote('é')}/facts", f"/?{token}", f"http://127.0.0.1/{token[:-1]}/facts"]
    found = {request(server, "GET", path)[::2] for path in wrong}
    found |= {request(server, "POST", path, b"{}")[::2] for path in wrong}
    assert found == {(403, b'{"error":"not allowed"}')}


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:{port}.evil.example", "0.0.0.0:{port}"],
)
def test_another_host_name_is_refused_even_with_the_token(server: Server, host: str) -> None:
    """Else a page whose name is made to mean 127.0.0.1 (DNS rebinding) could read the answers."""
    named = {"Host": host.format(port=server.server_port)}
    assert get(server, "facts", named)[0] == 403
    assert request(server, "POST", f"/{server.token}/save", b"{}", named | {TOKEN_HEADER: server.token})[0] == 403
    assert get(server, "facts", {"Host": f"localhost:{server.server_port}"})[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "", "http://127.0.0.1"])
def test_what_another_page_sends_saves_nothing(server: Server, tmp_path: Path, origin: str) -> None:
    wanted = {"state": state(), "path": str(tmp_path / "a.yaml")}
    assert post(server, wanted, Origin=origin)[0] == 403
    assert post(server, wanted, Origin=f"http://127.0.0.1:{server.server_port + 1}")[0] == 403
    assert not list(tmp_path.iterdir())
    assert post(server, wanted, Origin=f"http://127.0.0.1:{server.server_port}")[0] == 200


@pytest.mark.parametrize("name", ["start", "cancel"])
def test_what_another_page_sends_starts_and_stops_nothing(server: Server, name: str) -> None:
    order = {"model": "builtin", "plan": "plan.yaml", "out": "out"}
    assert post(server, order, name, Origin="http://evil.example")[0] == 403
    assert request(server, "POST", f"/{server.token}/{name}", json.dumps(order).encode())[0] == 403
    assert request(server, "GET", f"/{server.token}/{name}", None, {TOKEN_HEADER: server.token})[0] == 404
    assert server.desk.to_json() == {"state": "idle"}


def test_saving_needs_the_token_in_a_header_too(server: Server, tmp_path: Path) -> None:
    """A form of another page can't set headers, nor learn the token."""
    body = json.dumps({"state": state(), "path": str(tmp_path / "a.yaml")}).encode()
    for sent in ({}, {TOKEN_HEADER: "x"}, {TOKEN_HEADER: server.token[:-1]}):
        assert request(server, "POST", f"/{server.token}/save", body, sent)[0] == 403
    assert not list(tmp_path.iterdir())


def test_a_body_without_a_length_or_with_too_much_is_refused_unread(server: Server, tmp_path: Path) -> None:
    path, own = f"/{server.token}/save", {TOKEN_HEADER: server.token}
    assert request(server, "POST", path, None, own)[0] == 411
    for length in ("-1", "1e3", "+5", "5 5", "٣", ""):
        assert request(server, "POST", path, b"{}", own | {"Content-Length": length.encode("utf-8").decode("latin-1")})[0] == 411
    assert request(server, "POST", path, b"", own | {"Content-Length": str(MOST_BYTES + 1)})[0] == 413
    assert request(server, "POST", path, b"", own | {"Content-Length": "9" * 5000})[0] == 413
    assert request(server, "POST", path, b"{}", own | {"Transfer-Encoding": "chunked", "Content-Length": ""})[0] == 411
    padded = json.dumps({"state": state(), "path": str(tmp_path / "a.yaml")}).encode().ljust(MOST_BYTES)
    assert request(server, "POST", path, padded, own)[0] == 200


def test_a_body_that_never_comes_stops_nobody_else(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as silent:
        head = f"POST /{server.token}/save HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n{TOKEN_HEADER}: {server.token}\r\n"
        silent.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        assert get(server, "facts")[0] == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"state"', b"{}", b'{"state": {}}', b'{"path": "a.yaml"}', b'{"state": 5, "path": "a.yaml"}',
     b'{"state": {"bits": 5, "engine": "transformers"}, "path": 5}', b"\xff\xfe", b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_request_is_one_line(server: Server, tmp_path: Path, monkeypatch, body: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, answer = request(server, "POST", f"/{server.token}/save", body, {TOKEN_HEADER: server.token})
    assert code == 400
    assert json.loads(answer)["error"] and b"\\n" not in answer
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["nothing", "page.html", "session.py", "facts/", "../facts", "..", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd",
     "page.js/..", "..\\page.js", "//etc/passwd", "page.js%00", "%70age.js", "save"],
)  # fmt: skip
def test_only_the_names_of_the_page_are_there(server: Server, name: str) -> None:
    code, headers, body = get(server, name)
    assert (code, headers["content-type"]) == (404, "application/json")
    assert json.loads(body) == {"error": "there is no such page"}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "CONNECT", "TRACE"])
def test_other_methods_do_nothing(server: Server, method: str) -> None:
    assert request(server, method, f"/{server.token}/facts")[0] == 501


def test_the_page_loads_nothing_from_elsewhere_and_tells_nobody_its_address(server: Server) -> None:
    code, headers, body = get(server, "")
    assert code == 200 and b"http" not in body.replace(b"http-equiv", b"")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store" and "access-control-allow-origin" not in headers
    assert server.token.encode() not in body
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript"), ("plotly.js", "text/javascript")):
        code, headers, body = get(server, name)
        assert code == 200 and headers["content-type"].startswith(kind)
        assert len(gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body) > 1000


def test_requests_are_logged_nowhere(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """Lines of a log would hold the token."""
    get(server, "facts")
    get(server, "nothing")
    request(server, "GET", "/wrong/")
    request(server, "PUT", f"/{server.token}/facts")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [("plan", "lacks 'state'"), ("plan?state=", "not JSON"), ("setting?state=[]", "lacks a part"),
     ("cell?state={s}", "lacks 'block'"), ("cell?state={s}&block=0&role=zzz", "no such matrices"), ("compare", "lacks 'path'"),
     ("compare?path=/no/such", "no plan at")],
)  # fmt: skip
def test_a_question_that_has_no_answer_is_one_line(server: Server, name: str, words: str) -> None:
    code, _, body = get(server, name.format(s=quote(json.dumps(state()))))
    assert code == 400
    assert words in json.loads(body)["error"] and "\n" not in json.loads(body)["error"]


@pytest.mark.parametrize("more", [{}, {"context": 64, "batch": 2, "cache": "fp16"}, {"engine": "vllm"}, {"method": "two_sided"}])
def test_a_saved_plan_is_what_assay_plan_writes(
    server: Server, profile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: dict[str, object]
) -> None:
    code, answer = post(server, {"state": state(6.3, **more), "path": str(tmp_path / "saved.yaml")})
    assert (code, answer["saved"]) == (200, str(tmp_path / "saved.yaml"))
    options = [word for name, value in more.items() for word in (f"--{name}", value)]
    assert call(capfd, "plan", profile, "--bits", "6.3", *options, "-o", tmp_path / "made.yaml")[0] == 0
    assert (tmp_path / "saved.yaml").read_bytes() == (tmp_path / "made.yaml").read_bytes()
    Plan.load(tmp_path / "saved.yaml")


def test_a_saved_plan_repeats_the_warning_of_its_profile(profile: Path, tmp_path: Path) -> None:
    said = agreement.warning("a", "b", 0.5)
    index = dict(Profile.open(profile).index) | {"target": {"text": "b", "extra_loss": 0.5, "warning": said}}
    save_note(tmp_path / "profile.json", index)
    plan = Session(Profile.open(tmp_path)).plan(State.parse(json.dumps(state())))
    assert plan.sentence.endswith(said)


def test_saving_never_replaces_a_file(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nowhere")
    for name in ("mine.yaml", "link.yaml", "."):
        code, answer = post(server, {"state": state(), "path": str(tmp_path / name)})
        assert code == 400 and "exists; choose another name" in answer["error"]
    assert target.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir()) == ["link.yaml", "mine.yaml"]


def test_of_windows_that_save_at_once_one_succeeds(server: Server, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    wanted = [{"state": state(bits), "path": str(tmp_path / "a.yaml")} for bits in (5.0, 6.0, 7.0, 8.0)]
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda w: post(server, w)[0], wanted))
    assert sorted(codes) == [200, 400, 400, 400]
    kept = Plan.load(tmp_path / "a.yaml")
    assert kept.budget["bits"] == wanted[codes.index(200)]["state"]["bits"]


def test_a_port_that_is_taken_is_one_line(server: Server, profile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, "explore", profile, "--port", server.server_port)
    assert (code, out) == (2, "") and "leave --port out" in one_line(err)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped", "lacks"])
def test_a_damaged_profile_ends_with_one_line(
    profile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "p"
    if damage != "absent":
        shutil.copytree(profile, folder)
    note = folder / "profile.json"
    match damage:
        case "empty":
            note.write_text("")
        case "cut":
            note.write_bytes(note.read_bytes()[:-100])
        case "flipped":
            note.write_text(note.read_text().replace('"nearest": 0.', '"nearest": 1.', 1))
        case "lacks":
            save_note(note, {k: v for k, v in read_note(note, "damaged").items() if k != "ratios"})
    code, out, err = call(capfd, "explore", folder)
    assert (code, out) == (2, "")
    assert str(folder) in one_line(err)


def test_unknown_names_end_before_a_page_is_shown(profile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for option, word in (("--engine", "vlm"), ("--method", "gtpq")):
        code, out, err = call(capfd, "explore", profile, option, word)
        assert (code, out) == (2, "") and "did you mean" in one_line(err)


def test_as_a_program_it_prints_its_address_and_ends_with_ctrl_c(profile: Path) -> None:
    import signal
    from urllib.request import urlopen

    command = [sys.executable, "-m", "assay", "explore", str(profile)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().strip()
        with urlopen(address + "facts") as answer:
            assert json.load(answer)["profile"] == str(profile)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "closed\n")
    assert "Traceback" not in err
