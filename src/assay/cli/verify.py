"""assay verify: measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, ProgressKind, Shown, Window

Result = Annotated[str, typer.Argument(metavar="OUT", help="Folder that assay compress wrote.", show_default=False)]
Against = Annotated[str, typer.Option("--against", metavar="MODEL", help="The original.", show_default=False)]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text to judge on; the built-in evaluation text if not given.")
]
Tokens = Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens to judge on.", min=1)]


@command()
def run(
    out: Result,
    against: Against,
    text: Text = None,
    tokens: Tokens = None,
    window: Window = None,
    progress: Shown = ProgressKind.bars,
    as_json: Json = False,
) -> Answer:
    """Measure KL, perplexity and agreement on text that calibration never saw; exit 1 when a bound is missed."""
    import assay
    from assay.cli.progress import listener
    from assay.report import tables

    verdict = assay.verify(out, against, text=text, tokens=tokens, window=window, progress=listener(progress))
    return Answer(verdict, lambda: tables.verdict(verdict), 0 if verdict["passed"] else 1)
