"""assay compress: the whole way from a model to a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import (
    Batch,
    Bits,
    Cache,
    Calibration,
    Context,
    Evict,
    Json,
    Keep,
    Level,
    MaxLoss,
    Memory,
    Method,
    Model,
    Output,
    Planner,
    ProgressKind,
    Shown,
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
    bool,
    typer.Option("--sequential/--at-once", help="Solve for the inputs that the compressed blocks before give; see the docs."),
]
Minutes = Annotated[float | None, typer.Option("--minutes", metavar="N", help="How long evolution may search; 10 by default.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only rehearse on two blocks: print memory, disk, size and time, and write nothing.")
]
EngineOf = Annotated[
    str | None, typer.Option("--engine", metavar="NAME", help="What will run it: transformers (default), vllm, llama.cpp, ...")
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads of torch.", min=1)]


@command(resumes=True)
def run(
    model: Model, output: Output, plan: PlanFile = None, size: Size = None, bits: Bits = None, memory: Memory = None,
    context: Context = None, batch: Batch = None, cache: Cache = None, evict: Evict = None, max_loss: MaxLoss = None,
    level: Level = None, method: Method = "auto", calibration: Calibration = None, tokens: Tokens = None, window: Window = None,
    engine: EngineOf = None, keep: Keep = None, profile: ProfileFolder = None, uniform: Uniform = False,
    sequential: Sequential = False, polish: Polish = None, planner: Planner = "lagrange", minutes: Minutes = None,
    threads: Threads = None, dry_run: DryRun = False, progress: Shown = ProgressKind.bars, as_json: Json = False,
) -> Answer:  # fmt: skip
    """Compress by a plan, or straight to a budget. A call that was cut off continues where it stopped."""
    budget: dict[str, Any] = {
        "size": size, "bits": bits, "memory": memory, "max_loss": max_loss, "level": level, "context": context,
        "batch": batch, "cache": cache, "evict": evict,
    }  # fmt: skip
    _one_of(plan, budget)
    count = token_count(tokens)
    import assay
    from assay.cli.progress import listener
    from assay.report import tables

    report = assay.compress(
        model, output, plan=plan, profile=profile, method=method, calibration=calibration, tokens=count, window=window,
        engine=engine, keep=tuple(keep or ()), **({} if plan else budget), uniform=uniform, sequential=sequential,
        threads=threads, polish=polish, planner=planner, minutes=minutes, dry_run=dry_run, progress=listener(progress),
    )  # fmt: skip
    if dry_run:
        return Answer(report, lambda: tables.preflight(report))
    return Answer(report, lambda: tables.closing(report, model=model))


def _one_of(plan: Path | None, budget: dict[str, Any]) -> None:
    from assay.budget.size import LIMITS, check_limits

    given = [name for name, value in budget.items() if value is not None]
    if plan is not None and given:
        raise InputError(f"--plan and --{given[0].replace('_', '-')} exclude each other; the plan holds its budget")
    if plan is None and not given:
        raise InputError("give --plan or one budget: --size, --bits, --memory, --max-loss or --level (got none)")
    if plan is None:
        check_limits({name: budget.get(name) for name in LIMITS})
