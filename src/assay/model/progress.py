"""What a long step needs to say how far it is; silent unless somebody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Bars and lines. `task` yields a function that moves the bar by n."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[..., None]]: ...

    def log(self, message: str) -> None: ...


class Silent:
    """A Progress that says nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda n=1: None

    def log(self, message: str) -> None:
        return None
