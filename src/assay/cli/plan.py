"""assay plan: spend a budget on a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Bits, Engine, Json, Keep, Level, MaxLoss, Method, Output, Size, Uniform, absent

Source = Annotated[Path, typer.Argument(metavar="PROFILE", help="Folder that assay profile wrote.", show_default=False)]
Planner = Annotated[str, typer.Option("--planner", metavar="NAME", help="How the budget is divided.")]


@command()
def run(
    profile: Source, output: Output, size: Size = None, bits: Bits = None, max_loss: MaxLoss = None,
    level: Level = None, engine: Engine = "transformers", method: Method = "auto", keep: Keep = None,
    planner: Planner = "lagrange", uniform: Uniform = False, as_json: Json = False,
) -> Answer:  # fmt: skip
    """Choose a level for every weight matrix within a budget; writes text that can be edited."""
    absent(output)
    import assay
    from assay.report import tables

    made = assay.plan(
        profile, size=size, bits=bits, max_loss=max_loss, level=level, engine=engine, method=method, keep=tuple(keep or ()),
        planner=planner, uniform=uniform,
    )  # fmt: skip
    made.save(output)
    facts = tables.plan_facts(made, output)
    return Answer(facts, lambda: tables.planned(facts))
