"""Bars and lines on stderr; silent when nobody looks at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bars:
    """The Progress of a terminal: a bar with a remaining time per task, and log lines above the bars."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """A bar of `total` steps; tasks inside a task get bars below it."""
        if not self.console.is_terminal:
            yield lambda n=1: None
            return
        outermost = self._bars is None
        bars = self._bars = self._bars or self._start()
        bar = bars.add_task(description, total=total)
        try:
            yield lambda n=1: bars.advance(bar, n)
        finally:
            bars.remove_task(bar)
            if outermost:
                bars.stop()
                self._bars = None

    def log(self, message: str) -> None:
        """One line that stays."""
        if self.console.is_terminal:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _start(self) -> Progress:
        bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True,
        )  # fmt: skip
        bars.start()
        return bars
