"""Faults at random moments of a step, and what came of them. Each trial returns what happened, or raises Lost."""

from __future__ import annotations

import concurrent.futures
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from assay.model import memory
from assay.model.errors import InputError
from assay.model.files import load_tensors
from faults.steps import STEPS, Step, completed, copy, files, flip, hashes, prepare, start

SIGNALS = {"SIGKILL": (signal.SIGKILL, -9), "SIGINT": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}
INPUTS = {
    "profile": ("m/model.safetensors",), "compress": ("m/model.safetensors",),
    "solve": ("p", "plan.yaml"), "verify": ("out",), "export": ("out",),
}  # fmt: skip
MONTHS = 30 * 86_400


class Lost(AssertionError):
    """Something wrong was written as if it were right, or a state neither continues nor says what to remove."""


@dataclass(frozen=True)
class Case:
    """A step in a room of its own. wanted: what it makes undisturbed; seconds: how long that takes."""

    step: Step
    room: Path
    wanted: dict[str, str]
    seconds: float
    random: Random

    def moment(self) -> float:
        return self.random.uniform(0, 1.1 * self.seconds)

    def finish(self, outcome: str) -> str:
        """The step must come to its undisturbed end from here."""
        if problem := completed(self.step, self.room, self.wanted):
            raise Lost(problem)
        return outcome

    def judge(self, code: int, said: str, expected: tuple[int, ...], outcome: str) -> str:
        """After a fault: right and complete, or nothing in its place and one line; and then the step must be completed."""
        if code == 0:
            if hashes(self.room, self.step) != self.wanted:
                raise Lost("ended well with something else than undisturbed")
            return "ended undisturbed"
        if code not in expected:
            raise Lost(f"exit {code} where {expected} was expected: {said[-800:]}")
        if code > 0 and (not said or said.count("\n")):
            raise Lost(f"not one line: {said[-800:]!r}")
        return self.finish(outcome)


def signalled(case: Case, name: str) -> str:
    """A signal at a random moment."""
    number, code = SIGNALS[name]
    running = start(case.step, case.room)
    running.runs_for(case.moment())
    running.signal(number)
    ended, said = running.wait()
    return case.judge(ended, said, (code, -number), "resumed")


def disk_full(case: Case) -> str:
    """A small file system of its own that has room again later."""
    inputs = case.room.with_name(f"{case.room.name}.inputs")
    case.room.rename(inputs)
    need = sum(path.stat().st_size for path in files(inputs, ["."])) + (1 << 18)
    case.room.mkdir()
    with mounted(case.room, need + case.random.randrange(1 << 18, 1 << 20)):
        copy(inputs, case.room)
        code, said = start(case.step, case.room).wait()
        subprocess.run(["mount", "-o", "remount,size=200m", str(case.room)], check=True)
        return case.judge(code, said, (2,), "refused, then resumed with room")


def limited(case: Case) -> str:
    """No file may grow beyond a random size; for where nothing can be mounted."""
    most = int(2 ** case.random.uniform(8, 17))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    code, said = start(case.step, case.room, limit).wait()
    if code not in (0, 2) and not said:
        said = "assay: its own words did not fit"
    return case.judge(code, said, (2,), "refused, then resumed with room")


def read_only(case: Case) -> str:
    """A folder that can't be written to, and later can."""
    subprocess.run(["mount", "--bind", str(case.room), str(case.room)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(case.room)], check=True)
        before = {path: path.stat().st_mtime_ns for path in files(case.room, ["."])}
        code, said = start(case.step, case.room).wait()
        if code != 2 or before != {path: path.stat().st_mtime_ns for path in files(case.room, ["."])}:
            raise Lost(f"exit {code}: {said[-800:]}")
        subprocess.run(["mount", "-o", "remount,rw,bind", str(case.room)], check=True)
        return case.judge(code, said, (2,), "refused, then done")
    finally:
        subprocess.run(["umount", str(case.room)], check=True)


def changing_shard(case: Case) -> str:
    """The weights are written to while they are read, and put back."""
    shard = case.room / ("m" if case.step.name != "export" else "out") / "model.safetensors"
    raw = shard.read_bytes()
    running = start(case.step, case.room)
    running.runs_for(case.moment())
    damaged = bytearray(raw)
    for at in case.random.sample(range(len(raw) // 2, len(raw)), 64):
        damaged[at] ^= 0xFF
    shard.write_bytes(damaged)
    code, said = running.wait()
    shard.write_bytes(raw)
    return case.judge(code, said, (2,), "refused, then done")


def flipped_state(case: Case) -> str:
    """A bit of the unfinished work of a killed step flips."""
    running = start(case.step, case.room)
    running.runs_for(case.moment())
    running.signal(signal.SIGKILL)
    running.wait()
    there = files(case.room, case.step.unfinished)
    if not there:
        return case.finish("nothing was unfinished")
    flip(case.random.choice(there), case.random)
    problem = completed(case.step, case.room, case.wanted)
    if not problem:
        return "resumed, or refused and made anew"
    found = hashes(case.room, case.step)
    for name in case.wanted:
        if found.get(name) != case.wanted[name]:
            try:
                load_tensors(case.room / name)
            except InputError:
                continue
            raise Lost(problem)
    return "in a finished file: noticed when that is read"


def flipped_input(case: Case) -> str:
    """A bit flips in the profile, plan or result that a step reads: noticed, or without a consequence."""
    target = case.random.choice(files(case.room, INPUTS[case.step.name]))
    raw = target.read_bytes()
    flip(target, case.random)
    code, said = start(case.step, case.room).wait()
    if code == 0 and hashes(case.room, case.step) != case.wanted:
        if target.name == "plan.yaml":  # is made to be edited: another plan, carried out
            return "another plan"
        raise Lost(f"a bit of {target.name} went unnoticed")
    if code not in (0, 2) or (code and (not said or said.count("\n"))):
        raise Lost(f"{target.name}: exit {code}: {said[-800:]}")
    target.write_bytes(raw)
    if code == 0:
        return "without a consequence"
    return case.finish("refused, then done")


def two_at_once(case: Case) -> str:
    """The same command twice."""
    first = start(case.step, case.room)
    first.runs_for(case.random.uniform(0, 0.8 * case.seconds))
    second = start(case.step, case.room)
    ends = [first.wait(), second.wait()]
    for code, said in ends:
        if code not in (0, 2) or (code and (not said or said.count("\n"))):
            raise Lost(f"exit {code}: {said[-800:]}")
    if not any(code == 0 for code, _ in ends):
        raise Lost(f"neither was done: {ends}")
    if hashes(case.room, case.step) != case.wanted:
        raise Lost("the result is another one")
    return "one told, one done" if sorted(code for code, _ in ends) == [0, 2] else "both done"


def clock(case: Case) -> str:
    """The step is killed, the clock jumps back or forth by years, and it goes on."""
    running = start(case.step, case.room)
    running.runs_for(case.moment())
    running.signal(signal.SIGKILL)
    running.wait()
    shift = case.random.uniform(-120, 120) * MONTHS
    for path in files(case.room, case.step.unfinished):
        os.utime(path, (path.stat().st_atime + shift, path.stat().st_mtime + shift * case.random.random()))
    return case.finish("resumed")


def little_memory(case: Case) -> str:
    """Less address space than the step needs."""
    extra = int(2 ** case.random.uniform(10, 22))

    def limit() -> None:
        memory.release()
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + extra, resource.RLIM_INFINITY))

    code, said = start(case.step, case.room, limit).wait()
    if code < 0 or code not in (0, 1, 2):
        return case.finish(f"ended by {'a signal' if code < 0 else 'the interpreter'}, then resumed")
    return case.judge(code, said, (1,), "refused, then resumed with memory")


def worker_dies(case: Case) -> str:
    """One of the pieces of work that threads do comes to nothing."""
    place = case.random.randrange(40)

    def break_one() -> None:
        import torch

        submit, seen = concurrent.futures.ThreadPoolExecutor.submit, [0]
        torch.set_num_threads(2)

        def broken(self: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == place + 1:
                return submit(self, _dead)
            return submit(self, function, *args, **kwargs)

        concurrent.futures.ThreadPoolExecutor.submit = broken  # type: ignore[method-assign,assignment]

    code, said = start(case.step, case.room, break_one).wait()
    if code == 3 and "a worker died" in said:
        return case.finish("failed, then resumed")
    return case.judge(code, said, (), "")


def _dead() -> None:
    raise RuntimeError("a worker died")


@contextmanager
def mounted(place: Path, nbytes: int) -> Iterator[None]:
    """A file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(place)], check=True, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this machine lets us."""
    place = folder / "mounting"
    place.mkdir()
    try:
        with mounted(place, 1 << 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        place.rmdir()


ALL: dict[str, tuple[Callable[[Case], str], tuple[str, ...]]] = {
    **{name: (lambda case, name=name: signalled(case, name), tuple(STEPS)) for name in SIGNALS},
    "disk full": (disk_full, tuple(STEPS)),
    "file too large": (limited, tuple(STEPS)),
    "read-only folder": (read_only, tuple(STEPS)),
    "shard changes": (changing_shard, ("profile", "compress", "solve", "verify", "export")),
    "bit of unfinished work": (flipped_state, ("profile", "compress", "solve")),
    "bit of an input": (flipped_input, ("solve", "verify", "export")),
    "two at once": (two_at_once, tuple(STEPS)),
    "clock": (clock, ("profile", "compress", "solve")),
    "little memory": (little_memory, tuple(STEPS)),
    "worker dies": (worker_dies, ("profile", "compress", "solve")),
}  # fmt: skip
MOUNTS = ("disk full", "read-only folder")


class Bench:
    """Rooms and undisturbed results to try faults on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        self.undisturbed: dict[str, tuple[dict[str, str], float]] = {}
        prepare(self.base)

    def trial(self, kind: str, step: str, number: int) -> str:
        """One trial; the same number is the same fault, at about the same moment. Raises Lost."""
        wanted, seconds = self.undisturbed.get(step) or self._undisturbed(step)
        room = copy(self.base, self.folder / "room")
        case = Case(STEPS[step], room, wanted, seconds, Random(f"{kind}:{step}:{number}"))
        try:
            return ALL[kind][0](case)
        finally:
            for path in self.folder.glob("room*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _undisturbed(self, name: str) -> tuple[dict[str, str], float]:
        room = copy(self.base, self.folder / "room")
        begun = perf_counter()
        code, said = start(STEPS[name], room).wait()
        if code:
            raise Lost(f"{name} undisturbed: exit {code}: {said}")
        self.undisturbed[name] = hashes(room, STEPS[name]), perf_counter() - begun
        shutil.rmtree(room)
        return self.undisturbed[name]


def serve(folder: Path) -> None:
    """Answers lines of kind, step and number, separated by tabs, with what came of that trial.

    For programs that have threads: trials fork, which only a process without threads may do.
    """
    bench = Bench(folder)
    for line in sys.stdin:
        kind, step, number = line.rstrip("\n").split("\t")
        try:
            print("ok", bench.trial(kind, step, int(number)), flush=True)
        except Lost as error:
            print("LOST", " ".join(str(error).split()), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
