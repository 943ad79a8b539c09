"""What every command does alike: run quietly, print the answer, turn failures into one line and an exit code."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, ParamSpec

import typer

from assay.model import memory
from assay.model.errors import AssayError

P = ParamSpec("P")
INTERRUPTED = 130
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


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
    except KeyboardInterrupt:
        hint = "; the same command continues from here" if resumes else ""
        raise fail(f"interrupted{hint}", INTERRUPTED) from None
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise fail(f"{error.filename or 'the disk'}: {error.strerror}", 2) from None


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
