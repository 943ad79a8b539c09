"""What every command does alike: run quietly, print the answer, turn failures into one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from threading import current_thread, main_thread
from typing import Any, ParamSpec

import typer

from assay.model import memory
from assay.model.errors import AssayError

P = ParamSpec("P")
NARROW = 70
"""Columns of a terminal below which tables do without frames."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
    errno.ENOTDIR,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A command's result: what `--json` prints, what a person reads, and the exit code."""

    value: Any
    view: Callable[[], Any]
    exit_code: int = 0


def command(*, resumes: bool = False) -> Callable[[Callable[P, Answer]], Callable[P, None]]:
    """Make a function that returns an Answer into a command; `resumes` says that a second call continues."""

    def wrap(body: Callable[P, Answer]) -> Callable[P, None]:
        @functools.wraps(body)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            answer = _answer(lambda: body(*args, **kwargs), resumes)
            _show(answer, bool(kwargs.get("as_json")))
            raise typer.Exit(answer.exit_code)

        run.__annotations__ = body.__annotations__ | {"return": None}
        return run

    return wrap


def fail(message: object, code: int) -> typer.Exit:
    """Say in one line on stderr what went wrong; returns what to raise."""
    print(f"assay: {' '.join(str(message).split())}", file=sys.stderr)
    return typer.Exit(code)


def _answer(body: Callable[[], Answer], resumes: bool) -> Answer:
    prepare()
    try:
        with redirect_stdout(sys.stderr):
            return body()
    except BaseException as error:
        told = _told(error, "; the same command continues from here" if resumes else "")
        if told is None:
            raise
        raise told from None


def _told(error: BaseException, hint: str) -> typer.Exit | None:
    """Say in one line what a person can do something about; None for anything else."""
    if isinstance(error, KeyboardInterrupt) or _ending().number:
        return interrupted(hint)
    if isinstance(error, AssayError):
        return fail(error, error.exit_code)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return fail(f"{error.filename or 'the disk'}: {error.strerror}{hint}", 2)
    if memory.lacked(error):
        return fail(f"out of memory; free some, or give a smaller --window{hint}", 1)
    return None


class _Ending:
    """Does for every signal what Ctrl-C does, and remembers it: libraries in C make other errors of what comes while they run."""

    number, told = 0, False

    def __call__(self, number: int, frame: object) -> None:
        self.number = number
        raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """Lets the signals that ask a program to end do what Ctrl-C does, while this lasts; in the main thread only."""
    signals, ending = _SIGNALS if current_thread() is main_thread() else (), _Ending()
    before = {number: signal.signal(number, ending) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(hint: str = "") -> typer.Exit:
    """Say that a signal came; returns what to raise, with the exit code that shells give it."""
    ending = _ending()
    ending.told = True
    return fail(f"interrupted{hint}", 128 + (ending.number or signal.SIGINT))


def untold() -> bool:
    """Whether a signal came of which nothing was said."""
    return bool(_ending().number) and not _ending().told


def _ending() -> _Ending:
    ending = signal.getsignal(signal.SIGTERM)
    return ending if isinstance(ending, _Ending) else _Ending()


def prepare() -> None:
    """Settings that libraries read when they are imported, which the commands do late.

    Threads that wait by spinning stand in each other's way where other programs use the same cores, and
    threads that sleep at once take long to wake; so they spin for some microseconds. MKL gives the same sums in any
    number of threads (see `model/alike.py`). Torch asks for large pages for its tensors: a tenth of the time of large models
    is spent on getting small ones. A quarter of the time of imports would be spent on looking for garbage, and most of that of
    exiting.
    """
    settings = {
        "GOMP_SPINCOUNT": "20000",
        "MKL_CBWR": "AUTO,STRICT",
        "THP_MEM_ALLOC_ENABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not sys.stderr.isatty():
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(answer.value), indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    view = answer.view()
    if console.width < NARROW:
        _narrow(view)
    console.print(view)


def _narrow(view: Any) -> None:
    """Tables for a terminal of few columns: no frame, and words are broken rather than cut."""
    from rich.console import Group
    from rich.table import Table

    for part in view.renderables if isinstance(view, Group) else [view]:
        if isinstance(part, Table):
            part.box, part.pad_edge, part.padding = None, False, (0, 1, 0, 0)
            for column in part.columns:
                column.overflow = "fold"


def _plain(value: Any) -> Any:
    """A value without the numbers that JSON lacks: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
