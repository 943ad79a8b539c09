"""What a long step needs to say how far it is; silent unless somebody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

SWEEPS, PRICING = ("inputs, block by block", "gradients, block by block"), "pricing levels"
REHEARSING, COMPARING, COMPRESSING = "rehearsing on two blocks", "comparing, block by block", "compressing, block by block"
SAVING = "writing the result, reading it back"
"""Titles of the tasks that preflight tells apart."""


class Progress(Protocol):
    """Bars and lines. `task` yields a function that moves the bar by n; `log` says in words what `facts` are for a program."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[..., None]]: ...

    def log(self, message: str, **facts: object) -> None: ...


class Silent:
    """A Progress that says nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda n=1: None

    def log(self, message: str, **facts: object) -> None:
        return None


def remaining(done: int, total: int, at: float, now: float) -> float | None:
    """Seconds that the rest of a task takes at its average pace; None before its first step is done.

    at, now: seconds since it began, when its last step was done and now. While a step takes longer than the average,
    what is left doesn't count as less than the steps behind it.
    """
    if not done:
        return None
    pace = at / done
    return max(pace * (total - done) - (now - at), pace * (total - done - 1), 0.0)
