"""Memory of this process: what it takes, what is left, and giving back what was freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


def available() -> int:
    """Bytes that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def release() -> None:
    """Return freed memory now. The allocator of glibc keeps it for later, which adds up over the blocks of a deep model."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    if sys.platform != "linux":
        return lambda pad: 0
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
    return trim


def lacked(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def forget_peak() -> None:
    """Start the process's high-water mark anew, where the system lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most resident bytes of this process since `forget_peak`, mapped files included."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """Resident bytes of this process now, mapped files included."""
    return int(psutil.Process().memory_info().rss)
