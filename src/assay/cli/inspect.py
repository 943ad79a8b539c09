"""assay inspect: what is in a model, and what matters in it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Json
from assay.model.errors import InputError

Thing = Annotated[
    str,
    typer.Argument(metavar="MODEL|PROFILE", help="Folder, hub id or builtin; with --sensitivity a profile.", show_default=False),
]
Sensitivity = Annotated[bool, typer.Option("--sensitivity", help="Rank the weight matrices of a profile, and say which to keep.")]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="NAMES", help="Sensitivities to rank by, with commas between, or all; kfac if not given."),
]
Original = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The model of the profile; all sensitivities but kfac run it.")
]
Bits = Annotated[int | None, typer.Option("--bits", metavar="N", help="Rounding that is judged: 2, 3 or 4 bits.")]


@command()
def run(
    model: Thing, sensitivity: Sensitivity = False, by: By = None, original: Original = None, bits: Bits = None,
    as_json: Json = False,
) -> Answer:  # fmt: skip
    """What is in it: blocks, groups, parameters, bytes, ties, what can't be touched; or which matrices matter most."""
    import assay
    from assay.report import tables

    if sensitivity or by:
        return _ranked(model, by or "kfac", original, bits)
    if original or bits:
        raise InputError(f"{'--model' if original else '--bits'} goes with --sensitivity, which ranks the matrices of a profile")
    found = assay.inspect(model)
    return Answer(found, lambda: tables.inspection(found))


def _ranked(profile: str, by: str, model: str | None, bits: int | None) -> Answer:
    import assay
    from assay.budget import sensitivity
    from assay.cli.progress import Bars
    from assay.report import rankings

    names = sensitivity.names() if by == "all" else [name.strip() for name in by.split(",")]
    found = assay.rank(profile, names, model=model, bits=bits or sensitivity.BITS, progress=Bars())
    facts: dict[str, Any] = {"rankings": [r.to_json() for r in found], "correlations": sensitivity.correlations(found)}
    return Answer(facts, lambda: rankings.shown(found, facts["correlations"]))
