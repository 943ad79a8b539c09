"""What may happen while an input is read: nothing outside its folder, no programs, bounded memory and time."""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SECONDS = 20
MEMORY = 1 << 29
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
_ALLOWED = tuple(
    os.path.realpath(p)
    for p in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parents[2], "/proc", "/dev", "/sys")
)
_state: dict[str, Any] = {"folder": None, "installed": False, "seen": []}


class Escaped(Exception):
    """Something was done that no input may cause."""


class TooSlow(Exception):
    """It took longer than any input may."""


@contextmanager
def guarded(folder: Path, seconds: int = SECONDS, extra: int = MEMORY) -> Iterator[None]:
    """Watches this thread's process: files opened, programs started, bytes mapped and seconds.

    seconds: of one input; extra: bytes of address space that may be taken beyond those taken now.
    """
    if not _state["installed"]:
        sys.addaudithook(_watch)
        _state["installed"] = True
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + extra, hard))
    signal.alarm(seconds)
    _state.update(folder=os.path.realpath(folder), seen=[])
    try:
        yield
    finally:
        _state["folder"] = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if _state["seen"]:
        raise Escaped(", ".join(_state["seen"]))


def _late(number: int, frame: Any) -> None:
    raise TooSlow


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    folder = _state["folder"]
    if folder is None:
        return
    if event in _FORBIDDEN:
        _state["seen"].append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str | bytes):
        try:
            path = os.path.realpath(os.fsdecode(arguments[0]))
        except ValueError:
            return
        if not path.startswith((folder, *_ALLOWED)):
            _state["seen"].append(f"open {path}")
