"""assay compress: the whole way from a model to a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import (
    Bits,
    Calibration,
    Engine,
    Json,
    Keep,
    Level,
    MaxLoss,
    Method,
    Model,
    Output,
    Size,
    Tokens,
    Uniform,
    Window,
    token_count,
)  # fmt: skip
from assay.model.errors import InputError

PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="PLAN", help="A plan to carry out, instead of a budget.")]
ProfileFolder = Annotated[Path | None, typer.Option("--profile", metavar="PROFILE", help="A profile to use; else one is made.")]
Polish = Annotated[
    float | None,
    typer.Option("--polish", metavar="MINUTES", help="After rounding, tune scales and norms end to end for so long."),
]
Sequential = Annotated[
    bool | None,
    typer.Option("--sequential/--at-once", help="Solve for the inputs that the compressed blocks before give; see the docs."),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads of torch.", min=1)]


@command(resumes=True)
def run(
    model: Model, output: Output, plan: PlanFile = None, size: Size = None, bits: Bits = None, max_loss: MaxLoss = None,
    level: Level = None, method: Method = "auto", calibration: Calibration = None, tokens: Tokens = None, window: Window = None,
    engine: Engine = "transformers", keep: Keep = None, profile: ProfileFolder = None, uniform: Uniform = False,
    sequential: Sequential = None, polish: Polish = None, threads: Threads = None, as_json: Json = False,
) -> Answer:  # fmt: skip
    """Compress by a plan, or straight to a budget. A call that was cut off continues where it stopped."""
    given = {"--size": size, "--bits": bits, "--max-loss": max_loss, "--level": level}
    _one_of(plan, [name for name, value in given.items() if value is not None])
    count = token_count(tokens)
    import assay
    from assay.cli.progress import Bars
    from assay.report import tables

    report = assay.compress(
        model, output, plan=plan, profile=profile, size=size, bits=bits, max_loss=max_loss, level=level,
        method=method, calibration=calibration, tokens=count, window=window, engine=engine, keep=tuple(keep or ()),
        uniform=uniform, threads=threads, sequential=sequential, polish=polish, progress=Bars(),
    )  # fmt: skip
    return Answer(report, lambda: tables.closing(report, model=model))


def _one_of(plan: Path | None, budgets: list[str]) -> None:
    if plan is not None and budgets:
        raise InputError(f"--plan and {budgets[0]} exclude each other; the plan holds its budget")
    if plan is None and len(budgets) != 1:
        got = " and ".join(budgets) or "none"
        raise InputError(f"give --plan or one budget: --size, --bits, --max-loss or --level (got {got})")
