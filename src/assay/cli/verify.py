"""assay verify: measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, ProgressKind, Shown, Window
from assay.model.errors import InputError

Result = Annotated[str, typer.Argument(metavar="OUT", help="Folder that assay compress wrote.", show_default=False)]
Against = Annotated[str, typer.Option("--against", metavar="MODEL", help="The original.", show_default=False)]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text to judge on; the built-in evaluation text if not given.")
]
Tokens = Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens to judge on.", min=1)]
Compute = Annotated[
    str, typer.Option("--compute", metavar="TYPE", help="What both models compute in: float32, bfloat16 or float16.")
]
Batches = Annotated[
    str | None, typer.Option("--batches", metavar="N,N", help="Windows read at once, like 1,4,16: shows what that changes.")
]

Named = Annotated[
    str, typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-eval for both models, by name or YAML file, with commas.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Examples of each task; all if not given.", min=1)]


@command()
def run(
    out: Result, against: Against, text: Text = None, tokens: Tokens = None, window: Window = None, tasks: Named = "",
    limit: Limit = None, compute: Compute = "float32", batches: Batches = None, progress: Shown = ProgressKind.bars,
    as_json: Json = False,
) -> Answer:  # fmt: skip
    """Measure KL, perplexity and agreement on text that calibration never saw; exit 1 when a bound is missed."""
    sizes = _numbers(batches)
    import assay
    from assay.cli.progress import listener
    from assay.report import tables

    verdict = assay.verify(
        out, against, text=text, tokens=tokens, window=window, tasks=tasks.split(",") if tasks else (), limit=limit,
        compute=compute, batches=sizes, progress=listener(progress),
    )  # fmt: skip
    return Answer(verdict, lambda: tables.verdict(verdict), 0 if verdict["passed"] else 1)


def _numbers(text: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in (text or "").split(",")] if text is not None else []
    if odd := [part for part in parts if not part.isdecimal()]:
        raise InputError(f"--batches {text}: {odd[0] or 'nothing'} is no number; give numbers with commas between, like 1,4,16")
    return tuple(int(part) for part in parts)
