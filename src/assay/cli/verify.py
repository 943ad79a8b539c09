"""assay verify: measured beside predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, Window

Result = Annotated[str, typer.Argument(metavar="OUT", help="Folder that assay compress wrote.", show_default=False)]
Against = Annotated[str, typer.Option("--against", metavar="MODEL", help="The original.", show_default=False)]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text to judge on; the built-in evaluation text if not given.")
]
Tokens = Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens to judge on.", min=1)]

Named = Annotated[
    str, typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-eval for both models, by name or YAML file, with commas.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Examples of each task; all if not given.", min=1)]


@command()
def run(
    out: Result, against: Against, text: Text = None, tokens: Tokens = None, window: Window = None, tasks: Named = "",
    limit: Limit = None, as_json: Json = False,
) -> Answer:  # fmt: skip
    """Measure KL, perplexity and agreement on text that calibration never saw; exit 1 when a bound is missed."""
    import assay
    from assay.cli.progress import Bars
    from assay.report import tables

    named = tasks.split(",") if tasks else ()
    verdict = assay.verify(out, against, text=text, tokens=tokens, window=window, tasks=named, limit=limit, progress=Bars())
    return Answer(verdict, lambda: tables.verdict(verdict), 0 if verdict["passed"] else 1)
