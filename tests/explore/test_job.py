"""A compression that is started from the page: followed, cancelled, continued, and never left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import short
from explore.asking import get, post

import assay
from assay.explore.job import Desk, Order
from assay.explore.server import Server
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError

SOURCE = Path(assay.__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def same_source() -> Iterator[None]:
    """What is started imports the assay that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SOURCE))
        yield


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, serve: Callable[..., Server]) -> tuple[Server, Path]:
    """A server and a plan that takes seconds for each of two blocks of trained weights."""
    folder = tmp_path_factory.mktemp("slow")
    measured = assay.profile(short.save(folder / "m", blocks=2), folder / "p", tokens=512, window=64, methods=["two_sided"])
    assay.plan(measured.folder, bits=4.25, method="admm").save(folder / "plan.yaml")
    return serve(measured.folder), folder


def order(folder: Path, out: str = "out", **changes: object) -> dict[str, object]:
    return {"model": str(folder / "m"), "plan": str(folder / "plan.yaml"), "out": str(folder / out)} | changes


def until(server: Server, wanted: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
    """The first answer that is as wanted, as the page would see it."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = json.loads(get(server, "job")[2])
        if wanted(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"still {found}")


def ended(found: dict[str, Any]) -> bool:
    return found["state"] not in ("running", "cancelling")


@pytest.mark.slow
def test_it_is_followed_cancelled_and_continued(slow: tuple[Server, Path]) -> None:
    server, folder = slow
    assert json.loads(get(server, "job")[2]) == {"state": "idle"}
    assert get(server, "report")[0] == 404
    code, answer = post(server, order(folder), "start")
    assert (code, answer["state"], answer["out"]) == (200, "running", str(folder / "out"))
    code, answer = post(server, order(folder, "other"), "start")
    assert code == 400 and f"a compression into {folder / 'out'} is running" in answer["error"]
    found = until(server, lambda j: any(line.startswith("block-0000") for line in j["lines"]) or ended(j))
    (bar,) = found["tasks"]
    assert (bar["what"], bar["total"]) == ("compressing, block by block", 3) and 0 < bar["done"] < 3
    assert 0 < bar["left"] <= bar["seconds"] / bar["done"] * (3 - bar["done"])
    assert get(server, "report")[0] == 404
    assert post(server, {}, "cancel")[0] == 200
    found = until(server, ended)
    assert (found["state"], found["error"], found["report"]) == ("cancelled", "", False)
    assert not (folder / "out").exists()
    assert len(list((folder / ".out.assay").rglob("block-0000.safetensors"))) == 1

    assert post(server, order(folder), "start")[0] == 200
    found = until(server, ended)
    assert found["state"] == "done", found
    said = [line.partition(":")[0] for line in found["lines"]]
    assert "block-0001" in said and "block-0000" not in said
    assert found["result"]["bytes"] == Checkpoint.open(folder / "out").weight_bytes
    code, headers, body = get(server, "report")
    assert (code, body) == (200, (folder / "out" / "assay" / "report.html").read_bytes())
    assert headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")

    code, answer = post(server, order(folder), "start")
    assert code == 200
    found = until(server, ended)
    assert found["state"] == "failed" and "exists" in found["error"] and "\n" not in found["error"]


def test_closing_the_server_ends_it(slow: tuple[Server, Path]) -> None:
    _, folder = slow
    desk = Desk()
    desk.start(Order(**order(folder, "left"), profile=folder / "p"))
    assert desk.job is not None
    ends = time.monotonic() + 120
    while not desk.to_json().get("tasks") and time.monotonic() < ends:  # an import may swallow an interrupt
        time.sleep(0.02)
    (child,) = [p for p in psutil.Process().children() if str(folder / "left") in " ".join(p.cmdline())]
    desk.close()
    assert not child.is_running()
    assert desk.to_json()["state"] == "cancelled"
    assert not (folder / "left").exists()


@pytest.mark.parametrize("name", ["model", "plan", "out"])
@pytest.mark.parametrize("value", ["", "  ", "a\0b", 5, None, ["x"], "x" * 5000])
def test_an_order_that_names_nothing_starts_nothing(server: Server, name: str, value: object) -> None:
    code, answer = post(server, {"model": "builtin", "plan": "p.yaml", "out": "out"} | {name: value}, "start")
    assert code == 400 and answer["error"].startswith("name the")
    assert server.desk.to_json() == {"state": "idle"}


def test_a_part_that_is_missing_is_named(server: Server) -> None:
    code, answer = post(server, {"model": "builtin", "plan": "p.yaml"}, "start")
    assert (code, answer["error"]) == (400, "the request lacks 'out'")


def test_no_text_becomes_an_option_or_a_shell_command() -> None:
    words = Order("--help", "--version; x", "$(touch x)", Path("p")).command
    assert words[0] == "compress" and words[-2:] == ["--", "--help"]
    assert all(w.startswith("--plan=/") or w.startswith("--profile=/") or w.startswith("--output=/") for w in words[1:4])
    with pytest.raises(InputError, match="name the model"):
        Order("", "a", "b", Path("p"))
