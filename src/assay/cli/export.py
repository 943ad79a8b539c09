"""assay export: a result in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, Output

Result = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder that assay compress wrote, or a profile.", show_default=False)
]
Layout = Annotated[
    str,
    typer.Option("--to", metavar="LAYOUT", help="plain, compressed-tensors, gguf; of a profile imatrix.", show_default=False),
]


@command()
def run(out: Result, to: Layout, output: Output, as_json: Json = False) -> Answer:
    """Write a result as plain decoded weights, in the compressed-tensors layout or as GGUF; or a profile as an imatrix."""
    import assay
    from assay.report import tables

    report = assay.export(out, to, output)
    return Answer(report, lambda: tables.facts(report))
