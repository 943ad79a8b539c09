"""assay report: one page about a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, Output

Result = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that assay compress wrote.", show_default=False)]


@command()
def run(out: Result, output: Output, as_json: Json = False) -> Answer:
    """Write one page that opens in any browser without a network: verdict, map, frontier, ledger, how to repeat it."""
    import assay

    facts = assay.write_report(out, output)
    return Answer(facts, lambda: f"{facts['report']}: {facts['bytes']:,} bytes")
