"""Steps of the command line in processes of their own that start at once, and what a step must leave behind, whatever happens.

A process is a fork of this one, which has imported assay already; it has one thread when it forks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tiny import TEXT, save, text_file

import assay
import assay.run
from assay.cli.main import main

OPTIONS = ("--tokens", "512", "--window", "32")
LONGEST = 120.0


@dataclass(frozen=True)
class Step:
    """A command, the path that it makes or completes, and folders of unfinished work."""

    name: str
    arguments: tuple[str, ...]
    made: str
    unfinished: tuple[str, ...] = ()


STEPS = {step.name: step for step in (
    Step("profile", ("profile", "m", "-o", "made", "--calibration", "text.txt", *OPTIONS), "made", ("made",)),
    Step("compress", ("compress", "m", "--bits", "4.5", "-o", "made", "--calibration", "text.txt", *OPTIONS), "made",
         (".made.assay",)),
    Step("solve", ("compress", "m", "--plan", "plan.yaml", "--profile", "p", "-o", "made"), "made", (".made.assay",)),
    Step("verify", ("verify", "out", "--against", "m", "--text", "other.txt", *OPTIONS), "out/assay"),
    Step("export", ("export", "out", "--to", "plain", "-o", "made"), "made"),
)}  # fmt: skip


def prepare(room: Path) -> None:
    """A model, text, a profile, a plan and a result."""
    room.mkdir(exist_ok=True)
    save("llama", room / "m")
    text_file(room)
    (room / "other.txt").write_text(TEXT[::-1])
    assay.profile(room / "m", room / "p", calibration=room / "text.txt", tokens=512, window=32)
    plan = assay.plan(room / "p", bits=4.5)
    plan.save(room / "plan.yaml")
    assay.compress(room / "m", room / "out", plan=plan, profile=room / "p")


def copy(base: Path, room: Path) -> Path:
    """A room of one's own with the same times of change."""
    return Path(shutil.copytree(base, room, dirs_exist_ok=True))


@dataclass(frozen=True)
class Running:
    """A step at work."""

    pid: int
    errors: Path

    def wait(self, seconds: float = LONGEST) -> tuple[int, str]:
        """Exit code, negative for a signal, and the lines on stderr that begin with "assay: " or are part of a traceback."""
        until = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), self._said()
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)

    def runs_for(self, seconds: float) -> None:
        """Let it run for so long, or until it ends."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def _said(self) -> str:
        text = self.errors.read_text(errors="replace")
        if "Traceback" in text:
            return text[text.index("Traceback") :]
        return "\n".join(line for line in text.splitlines() if line.startswith("assay: "))


def start(step: Step, room: Path, before: Callable[[], object] = lambda: None, notes: Path | None = None) -> Running:
    """Run a step in a room. before: what the process does first; notes: where its stderr goes, which is in the room if None."""
    errors = (notes or room.parent) / f"{room.name}.{time.monotonic_ns()}.err"
    ready, begins = os.pipe()
    pid = os.fork()
    if pid:
        os.close(begins)
        os.read(ready, 1)
        os.close(ready)
        return Running(pid, errors)
    code = 3
    try:
        os.chdir(room)
        out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        before()
        os.close(ready)
        os.close(begins)
        main(list(step.arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def hashes(room: Path, step: Step) -> dict[str, str]:
    """SHA-256 of every file of what a step made, by its path."""
    found = {}
    for path in sorted((room / step.made).rglob("*")):
        if path.is_file():
            found[str(path.relative_to(room))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def removed(room: Path, message: str) -> bool:
    """Do what a refusal says: remove what it tells to remove."""
    _, found, rest = message.partition("remove ")
    target = Path(rest.split(" and ")[0].split("; ")[0].split(", ")[0].strip().rstrip(".")) if found else None
    if target is None or not (room / target).exists():
        return False
    place = room / target
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return True


def completed(step: Step, room: Path, wanted: Mapping[str, str]) -> str:
    """Run a step again until it is done, doing what refusals say; "" or what is wrong. The result must be the undisturbed one."""
    for _ in range(4):
        code, said = start(step, room).wait()
        if code == 0:
            found = hashes(room, step)
            differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            return f"differs: {differing[:4]}" if differing else ""
        if code != 2 or said.count("\n") or not said:
            return f"again: exit {code}: {said[-600:]}"
        if "exists" in said and hashes(room, step) == wanted:
            return ""
        if not removed(room, said):
            return f"refused without help: {said}"
    return "never done"


def flip(path: Path, random: Random) -> None:
    """Change one bit of a file; its times stay."""
    times, raw = path.stat(), bytearray(path.read_bytes())
    raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def files(room: Path, places: Sequence[str]) -> list[Path]:
    """Every file with content below these paths."""
    found = (p for place in places for p in ([room / place] if (room / place).is_file() else (room / place).rglob("*")))
    return sorted(p for p in found if p.is_file() and p.stat().st_size)
