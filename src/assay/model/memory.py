"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

M_MMAP_THRESHOLD = -3
LARGE = 8 << 20


def available() -> int | None:
    """Bytes that can be taken without swapping; None where the system doesn't tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def release() -> None:
    """Return freed memory now. The allocator of glibc keeps it for later, which adds up over the blocks of a deep model."""
    _trim()(0)


def steady() -> None:
    """Let every large tensor have pages of its own, which return to the system as soon as it is dropped.

    Left alone, glibc raises that bound with use, and memory peaks where the heap happens to be in pieces: 715 to 940 MB in
    runs that take 710 to 725 so, in the same time. For programs that are assay's own.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(M_MMAP_THRESHOLD, LARGE)


@cache
def _trim() -> Callable[[int], int]:
    if sys.platform != "linux":
        return lambda pad: 0
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
    return trim


def forget_peak() -> None:
    """Start the process's high-water mark anew, where the system lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most resident bytes of this process since `forget_peak`, mapped files included."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """Resident bytes of this process now; the peak where the system doesn't tell."""
    return _status("VmRSS") or peak()


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
