"""Bars and lines on stderr; silent when nobody looks at it, JSON for a program that asks for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.text import Text

from assay.cli.options import ProgressKind
from assay.model.progress import remaining

FIGURES, ROOMY = 26, 80
"""Columns of a terminal that the figures of a bar take at most, and those from which the bar itself is shown."""


class Lines:
    """The Progress for another program: on stderr one JSON object a line, `task` with `done` and `total` or with `ended`,
    or `line`: what would stay above the bars, with its figures beside it."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """See `Progress`."""
        done = 0

        def advance(n: int = 1) -> None:
            nonlocal done
            done += n
            _say(task=description, done=done, total=total)

        advance(0)
        try:
            yield advance
        finally:
            _say(task=description, ended=True)

    def log(self, message: str, **facts: object) -> None:
        """One line that stays, and its figures by name."""
        _say(line=message, **facts)


def _say(**what: object) -> None:
    print(json.dumps(what), file=sys.stderr, flush=True)


def listener(kind: ProgressKind) -> Bars | Lines:
    """The Progress of a kind."""
    return Lines() if kind == ProgressKind.lines else Bars()


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
        bar = bars.add_task(description, total=total, at=bars.get_time())
        try:
            yield lambda n=1: bars.update(bar, advance=n, at=bars.get_time())
        finally:
            bars.remove_task(bar)
            if outermost:
                bars.stop()
                self._bars = None

    def log(self, message: str, **facts: object) -> None:
        """One line that stays."""
        if self.console.is_terminal:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _start(self) -> Progress:
        roomy = self.console.width >= ROOMY
        shape = [BarColumn(max(10, min(40, self.console.width - 68)))] if roomy else []
        clock = [TimeElapsedColumn()] if roomy else []
        bars = Progress(_Words(self.console), *shape, MofNCompleteColumn(), *clock, _Left(), console=self.console, transient=True)
        bars.start()
        return bars


class _Words(ProgressColumn):
    """What is done, cut to what a narrow terminal leaves for it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        words = Text(task.description)
        words.truncate(max(8, self._console.width - FIGURES), overflow="ellipsis")
        return words


class _Left(ProgressColumn):
    """Remaining time by the average of all steps: rich forgets steps that took more than half a minute."""

    def render(self, task: Task) -> Text:
        began = task.start_time or 0.0
        left = remaining(int(task.completed), int(task.total or 0), task.fields["at"] - began, task.get_time() - began)
        if left is None:
            return Text("left -:--:--", "progress.remaining")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}", "progress.remaining")
