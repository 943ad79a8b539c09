"""What may happen while an input is read: nothing outside its folders, no programs, bounded memory and time."""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assay.model.errors import AssayError

SECONDS = 10
MEMORY = 1 << 28
WAITING = 6
"""Times as many seconds may pass on the clock as of the processor: the machine may be busy with other work."""
LATE = (signal.SIGPROF, signal.SIGALRM)
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate", "shutil.rmtree")
_READ = tuple(
    os.path.realpath(p)
    for p in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parents[2], "/proc", "/dev", "/sys")
)
_state: dict[str, Any] = {"inside": None, "also": (), "installed": False, "seen": []}


class Escaped(Exception):
    """Something was done that no input may cause."""


class TooSlow(BaseException):
    """It took longer than any input may."""


@contextmanager
def guarded(folder: Path, also: Sequence[Path] = (), seconds: int = SECONDS, extra: int = MEMORY) -> Iterator[None]:
    """Watches this process: files opened and changed, programs started, address space and seconds.

    folder: where anything may happen; also: what may be read; seconds: of the processor; extra: bytes of address space that may
    be taken beyond those taken now. Raises Escaped, TooSlow and MemoryError, the last also where it was caught on its way.
    """
    if not _state["installed"]:
        sys.addaudithook(_watch)
        _state["installed"] = True
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = [signal.signal(number, _late) for number in LATE]
    resource.setrlimit(resource.RLIMIT_AS, (_taken() + extra, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(WAITING * seconds)
    _state.update(inside=os.path.realpath(folder), also=tuple(map(os.path.realpath, also)), seen=[])
    try:
        yield
    except AssayError as error:
        if _lacked_memory(error):
            raise MemoryError from error
        raise
    finally:
        _state["inside"] = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip(LATE, before, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if _state["seen"]:
            raise Escaped(", ".join(_state["seen"]))


def _taken() -> int:
    """Bytes of address space."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _lacked_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _late(number: int, frame: Any) -> None:
    raise TooSlow


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _state["inside"] is None:
        return
    if event in _PROGRAMS:
        _state["seen"].append(f"{event} {arguments!r:.200}")
    elif event in _CHANGES:
        _check(event, arguments[0], writes=True)
    elif event == "open":
        _check(event, arguments[0], bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def _check(event: str, place: Any, writes: bool) -> None:
    if not isinstance(place, str | bytes | os.PathLike):
        return
    try:
        path = os.path.realpath(os.fsdecode(place))
    except ValueError:
        return
    allowed = (_state["inside"],) if writes else (_state["inside"], *_state["also"], *_READ)
    cached = "__pycache__" in path and path.startswith(_READ)
    if not cached and not any(path == a or path.startswith(a + os.sep) for a in allowed) and path != os.devnull:
        _state["seen"].append(f"{event} {path}")
