"""assay plan: spend a budget on a profile, or several, or see what every size would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import (
    Batch,
    Bits,
    Cache,
    Context,
    Engine,
    Evict,
    Json,
    Keep,
    Latency,
    Level,
    MaxLoss,
    Memory,
    Method,
    Planner,
    Size,
    Speeds,
    TokensPerSecond,
    Uniform,
    absent,
)  # fmt: skip
from assay.model.errors import InputError

Source = Annotated[Path, typer.Argument(metavar="PROFILE", help="Folder that assay profile wrote.", show_default=False)]
Target = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="PATH", help="The plan; a folder of plans with --sizes; may be left out with --sweep."
    ),
]
Sweep = Annotated[
    str | None, typer.Option("--sweep", metavar="LOW:HIGH", help="Bits from and to: prints size and loss of every plan between.")
]
Sizes = Annotated[
    str | None, typer.Option("--sizes", metavar="SIZE,SIZE", help="Several sizes: writes a plan for each into the folder.")
]


@command()
def run(
    profile: Source, output: Target = None, size: Size = None, bits: Bits = None, memory: Memory = None,
    context: Context = None, batch: Batch = None, cache: Cache = None, evict: Evict = None, max_loss: MaxLoss = None,
    level: Level = None, latency: Latency = None, tokens_per_second: TokensPerSecond = None, speeds: Speeds = None,
    sweep: Sweep = None, sizes: Sizes = None, engine: Engine = "transformers", method: Method = "auto", keep: Keep = None,
    planner: Planner = "lagrange", uniform: Uniform = False, as_json: Json = False,
) -> Answer:  # fmt: skip
    """Choose a level for every weight matrix within a budget; writes text that can be edited."""
    how: dict[str, Any] = {"engine": engine, "method": method, "keep": tuple(keep or ()), "planner": planner}
    load: dict[str, Any] = {"context": context, "batch": batch, "cache": cache, "evict": evict}
    limits: dict[str, Any] = {
        "size": size, "bits": bits, "memory": memory, "max_loss": max_loss, "level": level, "latency": latency,
        "tokens_per_second": tokens_per_second,
    }  # fmt: skip
    _alone(sweep=sweep, sizes=sizes, uniform=uniform or None, speeds=speeds, **limits, **load)
    if sweep is not None:
        return _sweep(profile, output, sweep, how)
    if output is None:
        raise InputError("give --output: where the plan goes")
    absent(output)
    if sizes is not None:
        return _sizes(profile, output, sizes, how | load | {"uniform": uniform})
    import assay
    from assay.report import tables

    made = assay.plan(profile, **how, **limits, **load, uniform=uniform, speeds=speeds)
    made.save(output)
    facts = tables.plan_facts(made, output)
    return Answer(facts, lambda: tables.planned(facts))


def _alone(*, sweep: str | None, sizes: str | None, **others: Any) -> None:
    """Raises InputError naming two options that contradict each other."""
    along = {"sweep": (), "sizes": ("context", "batch", "cache", "uniform")}
    for name, value in (("sweep", sweep), ("sizes", sizes)):
        further = others | ({"sizes": sizes} if name == "sweep" else {})
        if value is not None and (odd := [o for o, v in further.items() if v is not None and o not in along[name]]):
            raise InputError(f"--{name} and --{odd[0].replace('_', '-')} exclude each other; give one of them")


def _sweep(profile: Path, output: Path | None, sweep: str, how: dict[str, Any]) -> Answer:
    if output is not None:
        absent(output)
    import assay
    from assay.budget.sweep import parse_range
    from assay.model.files import save_json
    from assay.report import tables

    facts = assay.sweep(profile, *parse_range(sweep), **how)
    if output is not None:
        save_json(output, facts)
    return Answer(facts, lambda: tables.frontier(facts))


def _sizes(profile: Path, output: Path, sizes: str, how: dict[str, Any]) -> Answer:
    import assay
    from assay.report import tables

    names = [part.strip() for part in sizes.split(",")]
    made = {name: assay.plan(profile, size=name, **how) for name in names}
    output.mkdir()
    for name, plan in made.items():
        plan.save(output / f"{name}.yaml")
    facts = [tables.plan_facts(plan, output / f"{name}.yaml") for name, plan in made.items()]
    return Answer(facts, lambda: tables.several(facts))
