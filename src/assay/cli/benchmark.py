"""assay benchmark: how fast this machine multiplies by a model's matrices, for budgets of time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json, Output

Source = Annotated[Path, typer.Argument(metavar="PROFILE", help="Folder that assay profile wrote.", show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads of torch.", min=1)]


@command()
def run(profile: Source, output: Output, threads: Threads = None, as_json: Json = False) -> Answer:
    """Measure one token's matrix products by level and shape; `assay plan --tokens-per-second` counts with them."""
    import torch

    import assay
    from assay.report import tables

    if threads:
        torch.set_num_threads(threads)
    found = assay.benchmark(profile, output)
    rows = [{"level": level, "shape": list(shape), "seconds": s} for (level, shape), s in sorted(found.seconds.items())]
    facts = {"speeds": str(output), "machine": found.machine, "rows": rows}
    return Answer(facts, lambda: tables.speeds(facts))
