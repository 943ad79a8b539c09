"""What every command does alike: run quietly, print the answer, turn failures into one line and an exit code."""

from __future__ import annotations

import errno
import functools
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
INTERRUPTED = 130
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
}  # fmt: skip
_CONTINUES = "; the same command continues from here"


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
    _prepare()
    try:
        with redirect_stdout(sys.stderr):
            return body()
    except AssayError as error:
        raise fail(error, error.exit_code) from None
    except KeyboardInterrupt as stop:
        raise interrupted(stop, resumes) from None
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise fail(f"{error.filename or 'the disk'}: {error.strerror}{_CONTINUES if resumes else ''}", 2) from None
    except (MemoryError, RuntimeError) as error:
        if not memory.lacked(error):
            raise
        raise fail(f"out of memory; free some, or give a smaller --window{_CONTINUES if resumes else ''}", 1) from None


@contextmanager
def terminable() -> Iterator[None]:
    """Lets the signals that ask a program to end do what Ctrl-C does, while this lasts; in the main thread only."""
    signals = _ENDING if current_thread() is main_thread() else ()
    before = {number: signal.signal(number, _terminate) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(stop: BaseException, resumes: bool = False) -> typer.Exit:
    """Say that a signal came; returns what to raise, with the exit code that shells give it."""
    code = 128 + stop.number if isinstance(stop, Terminated) else INTERRUPTED
    return fail(f"interrupted{_CONTINUES if resumes else ''}", code)


class Terminated(KeyboardInterrupt):
    """A signal other than that of Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: object) -> None:
    raise Terminated(number)


def _prepare() -> None:
    """Settings that libraries read when they are imported, which the commands do late.

    Threads that wait by spinning stand in each other's way where other programs use the same cores, and
    threads that sleep at once take long to wake; so they spin for some microseconds.
    """
    settings = {"GOMP_SPINCOUNT": "20000", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if not sys.stderr.isatty():
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    memory.steady()


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(answer.value), indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(answer.view())


def _plain(value: Any) -> Any:
    """A value without the numbers that JSON lacks: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
