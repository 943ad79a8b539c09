"""assay profile: measure what each weight matrix is worth."""

from __future__ import annotations

from typing import Annotated

import typer

from assay.cli import completion
from assay.cli.answer import Answer, command
from assay.cli.options import Calibration, Json, Model, Output, ProgressKind, Shown, Tokens, Window, token_count

Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of the labels that are sampled from the model.", min=0, max=1 << 40)
]

Methods = Annotated[
    list[str] | None,
    typer.Option("--method", metavar="NAME", help="Price what it offers; may be repeated.", autocompletion=completion.methods),
]
Levels = Annotated[list[str] | None, typer.Option("--level", metavar="LEVEL", help="Price this one too; may be repeated.")]

Weights = Annotated[
    str, typer.Option("--token-weights", metavar="KIND", help="How tokens count in H: none, attention, first-N or chunk-A-B.")
]

Select = Annotated[
    str | None, typer.Option("--select", metavar="NAME", help="Choose among eight times as much text: dsir or kmeans.")
]
Target = Annotated[
    str | None, typer.Option("--target", metavar="FILE", help="Your own text: what dsir looks for, and is compared with.")
]
Cache = Annotated[bool, typer.Option("--cache", help="Price the cache of every layer too, for --memory; loads the whole model.")]


@command(resumes=True)
def run(
    model: Model, output: Output, calibration: Calibration = None, tokens: Tokens = None, window: Window = None,
    seed: Seed = 0, token_weights: Weights = "none", method: Methods = None, level: Levels = None, select: Select = None,
    target: Target = None, cache: Cache = False, progress: Shown = ProgressKind.bars, as_json: Json = False,
) -> Answer:  # fmt: skip
    """Measure a model on a text. A call that was cut off continues where it stopped."""
    count = token_count(tokens)
    import assay
    from assay.cli.progress import listener
    from assay.profiling import REHEARSED
    from assay.report import tables
    from assay.run import open_model

    if cache:
        from assay.cache_pricing import priced_length
        from assay.measure.stream import StreamedModel

        priced_length(StreamedModel(open_model(model)))
    measured = assay.profile(
        model, output, calibration=calibration, tokens=count, window=window, seed=seed, methods=[*REHEARSED, *(method or ())],
        levels=level or (), token_weights=token_weights, select=select, target=target, progress=listener(progress),
    )  # fmt: skip
    if cache:
        assay.price_cache(open_model(model).folder, measured.folder, calibration, listener(progress))
    facts = {"profile": str(measured.folder), "family": measured.index["family"], **measured.index["calibration"]}
    facts["target"] = measured.index["target"]
    return Answer(facts, lambda: tables.profiled(facts))
