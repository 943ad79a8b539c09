"""How numerical loops are compiled for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def loop(cache: bool = False) -> Callable[[Function], Function]:
    """Compiles a loop. Dividing by zero gives infinity in it: a check for that would keep it from becoming vector code."""
    return njit(nogil=True, cache=cache, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")  # type: ignore[return-value]
