"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

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
