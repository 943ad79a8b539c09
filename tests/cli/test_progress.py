"""Bars live on a terminal only, and nest."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from assay.cli.progress import Bars


def bars(terminal: bool) -> tuple[Bars, io.StringIO]:
    stream = io.StringIO()
    return Bars(Console(file=stream, force_terminal=terminal, width=100)), stream


def work(listener: Bars) -> None:
    with listener.task("blocks", 2) as advance:
        for _ in range(2):
            with listener.task("matrices", 3) as inner:
                inner()
                inner(2)
            listener.log("one block: [4 bits]")
            advance()


def test_nothing_is_written_where_nobody_looks() -> None:
    listener, stream = bars(terminal=False)
    work(listener)
    assert stream.getvalue() == ""


def test_a_terminal_shows_bars_and_lines_as_they_are() -> None:
    listener, stream = bars(terminal=True)
    work(listener)
    work(listener)
    assert stream.getvalue().count("one block: [4 bits]") == 4
    assert "matrices" in stream.getvalue()


def test_a_failure_inside_a_task_ends_the_bars() -> None:
    listener, _ = bars(terminal=True)
    with pytest.raises(ValueError, match="x"), listener.task("blocks", 2):
        raise ValueError("x")
    work(listener)
