"""assay transform: other weights, the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli import completion
from assay.cli.answer import Answer, command
from assay.cli.options import Json, Model, Output, ProgressKind, Shown

With = Annotated[
    list[str],
    typer.Option(
        "--with",
        metavar="NAME",
        help="A transform, like rotate or awq:bits=3; may be repeated.",
        show_default=False,
        autocompletion=completion.transforms,
    ),
]
ProfileFolder = Annotated[
    Path | None, typer.Option("--profile", metavar="PROFILE", help="A profile of MODEL, for those that read one.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of random rotations.", min=0, max=1 << 40)]


@command()
def run(
    model: Model,
    wanted: With,
    output: Output,
    profile: ProfileFolder = None,
    seed: Seed = 0,
    progress: Shown = ProgressKind.bars,
    as_json: Json = False,
) -> Answer:
    """Change the weights of a model and not its function, so that it compresses better."""
    import assay
    from assay.cli.progress import listener
    from assay.report import tables

    report = assay.transform(model, output, wanted, profile=profile, seed=seed, progress=listener(progress))
    return Answer(report, lambda: tables.transformed(report))
