"""assay export, also called assay convert: a result in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, Output

FOLDER = "Folder that assay compress wrote, any compressed checkpoint, or a profile."
NAMES = "plain, compressed-tensors, gptq, awq, assay or gguf; of a profile imatrix."
Result = Annotated[Path, typer.Argument(metavar="OUT", help=FOLDER, show_default=False)]
Layout = Annotated[str, typer.Option("--to", metavar="LAYOUT", help=NAMES, show_default=False)]


@command()
def run(out: Result, to: Layout, output: Output, as_json: Json = False) -> Answer:
    """Write a compressed checkpoint in another layout that holds the same weights exactly; or a profile as an imatrix."""
    import assay
    from assay.report import tables

    report = assay.export(out, to, output)
    return Answer(report, lambda: tables.facts(report))
