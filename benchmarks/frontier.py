"""Mixed plans against uniform ones over a range of bytes, and all planners at one budget, by measured KL.

python benchmarks/frontier.py [--model DIR|builtin] [--method two_sided] [--engine transformers] [--minutes 10]

Every matrix is encoded once at each level that a plan asks for; then whole models are run on text that calibration never
saw. Uniform levels are interpolated in log KL over real bits, between whole bits at one group size.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL, arguments, machine, table, work_folder, write
from torch import Tensor

import assay
from assay import engines
from assay.budget import planners, plans
from assay.budget.plan import Plan
from assay.budget.size import Budget
from assay.evolving import LevelStore, evolved
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.methods import base
from assay.model.level import Level
from assay.model.progress import Silent
from assay.model.sites import Site
from assay.prove.variants import mean_kl
from assay.run import open_model

BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
TOGETHER = 6
Levels = dict[str, str | None]


class Bench:
    """One model, its profile, and the KL of any levels on the judge's text."""

    def __init__(self, model: str, method: str, engine: str, folder: Path, tokens: int) -> None:
        shipped = model == "builtin"
        self.method, self.contract = method, engines.get(engine)
        begun = time.perf_counter()
        self.profile: Profile = assay.profile(
            model, folder / "profile", calibration=None if shipped else CALIBRATION_TEXT, methods=(method,)
        )
        self.profile_seconds = time.perf_counter() - begun
        self.model = StreamedModel(open_model(model))
        self.store = LevelStore(self.model, self.profile, method, folder / "levels")
        self.sites = [s for s in self.model.anatomy.sites.values() if s.block is not None]
        text = windows(self.model.checkpoint, None if shipped else JUDGE_TEXT, "evaluation", tokens, 256, self.model.vocabulary)
        self.judge: Tensor = text.ids

    def bits(self, levels: Levels) -> float:
        """Real bits per weight in the blocks."""
        size = sum(Level.parse(name).nbytes(*s.shape) if (name := levels[s.name]) else 2 * s.count for s in self.sites)
        return 8 * size / sum(s.count for s in self.sites)

    def kl(self, everyone: Sequence[Levels]) -> list[float]:
        """Nats per token of whole models, in float32."""
        found: list[float] = []
        for start in range(0, len(everyone), TOGETHER):
            keys = [self._keys(levels) for levels in everyone[start : start + TOGETHER]]
            found += mean_kl(self.model, self.judge, keys, self._override)
        return found

    def plan(self, bits: float, planner: str) -> Plan:
        """A plan for an average of `bits`."""
        return plans.make(self.profile, Budget(bits=bits), self.contract, self.method, (), planner, False)

    def uniform(self) -> list[tuple[float, Levels]]:
        """(bits, levels) of every level of whole bits that the method offers everywhere, integers with zero points."""
        columns = {s.shape[1] for s in self.sites}
        offered = set.intersection(*(set(base.get(self.method)().levels(n)) for n in columns))
        whole = [x for x in sorted(offered) if x.bits == int(x.bits) <= BUDGETS[-1] and (x.format != "int" or not x.symmetric)]
        same = [{s.name: x.name for s in self.sites} for x in whole if all(self.contract.takes(x, n) for n in columns)]
        return [(self.bits(levels), levels) for levels in same]

    def _keys(self, levels: Levels) -> list[Hashable]:
        keys: list[list[tuple[str, str | None]]] = [[] for _ in self.model.blocks]
        for site in self.sites:
            assert site.block is not None
            keys[site.block].append((site.name, levels[site.name]))
        return [tuple(key) for key in keys]

    def _override(self, block: int, key: Hashable) -> Any:
        assert isinstance(key, tuple)
        levels: Levels = dict(key)

        def override(site: Site, weight: Tensor) -> Tensor:
            name = levels.get(site.name)
            return weight if name is None else self.store.decoded(site, name)

        return override


def levels_of(plan: Plan) -> Levels:
    """Level by site."""
    return {name: choice.level for name, choice in plan.choices.items()}


def interpolated(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """KL at `bits`, linear in its logarithm between (bits, KL) of whole bits; None outside them."""
    points = sorted(points)
    for (low, before), (high, after) in pairwise(points):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    return None


def frontier(bench: Bench) -> list[dict[str, Any]]:
    """One row a budget."""
    flat = bench.uniform()
    flat_kl = bench.kl([levels for _, levels in flat])
    groups: dict[str, list[tuple[float, float]]] = {}
    for (bits, levels), kl in zip(flat, flat_kl, strict=True):
        level = Level.parse(str(next(iter(levels.values()))))
        groups.setdefault(f"g{level.group_size}" if level.group_size else "channel", []).append((bits, kl))
    made = [bench.plan(bits, "lagrange") for bits in BUDGETS]
    rows = []
    for budget, plan, kl in zip(BUDGETS, made, bench.kl([levels_of(p) for p in made]), strict=True):
        real = bench.bits(levels_of(plan))
        same = {name: found for name, points in groups.items() if (found := interpolated(points, real)) is not None}
        fits = min(k for (bits, _), k in zip(flat, flat_kl, strict=True) if bits <= budget)
        rows.append({"budget": budget, "bits": real, "kl": kl, "predicted": plan.predicted, "uniform": same, "fits": fits})
    return rows


def compared(bench: Bench, bits: float, minutes: float, folder: Path) -> list[dict[str, Any]]:
    """One row a planner at one budget; evolution searches for `minutes`."""
    rows = []
    for name in [n for n in planners.names() if n != "evolution"]:
        begun = time.perf_counter()
        plan = bench.plan(bits, name)
        rows.append({"planner": name, "seconds": time.perf_counter() - begun, "plan": plan})
    if minutes:
        begun = time.perf_counter()
        start = bench.plan(bits, "lagrange")
        plan = evolved(bench.model, bench.profile, start, bench.contract, (), minutes, folder, Silent())
        rows.append({"planner": f"evolution, {minutes:g} minutes", "seconds": time.perf_counter() - begun, "plan": plan})
    for row, kl in zip(rows, bench.kl([levels_of(row["plan"]) for row in rows]), strict=True):
        plan = row.pop("plan")
        row |= {"kl": kl, "bits": bench.bits(levels_of(plan)), "predicted": plan.predicted}
    return rows


def report(bench: Bench, rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], threads: int) -> str:
    """Both tables as markdown."""
    groups = sorted({name for row in rows for name in row["uniform"]})
    lines = [
        [row["budget"], f"{row['bits']:.3f}", f"{row['kl']:.5f}", f"{row['predicted']:.5f}", f"{row['kl'] / row['fits']:.2f}",
         *(f"{row['kl'] / row['uniform'][g]:.2f}" if g in row["uniform"] else "" for g in groups)]
        for row in rows
    ]  # fmt: skip
    header = [
        "bits",
        "real bits",
        "KL",
        "predicted",
        "/ best uniform that fits",
        *(f"/ uniform {g}, interpolated" for g in groups),
    ]
    parts = [machine(threads), f"profile: {bench.profile_seconds:.0f} s", table(header, lines)]
    if others:
        best = min(row["kl"] for row in others)
        body = [
            [r["planner"], f"{r['seconds']:.2f}", f"{r['bits']:.3f}", f"{r['kl']:.5f}", f"{r['kl'] / best:.3f}"] for r in others
        ]
        parts.append(table(("planner", "seconds", "real bits", "KL", "/ best"), body))
    return "\n\n".join(parts)


def main() -> None:
    """The frontier, and the planners at one budget."""
    parser = arguments(__doc__)
    parser.set_defaults(model=str(MODEL))
    parser.add_argument("--method", default="two_sided")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--at", type=float, default=3.0, help="bits at which planners are compared")
    parser.add_argument("--minutes", type=float, default=0.0, help="of evolution; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the judge")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(str(given.model), given.method, given.engine, Path(folder), given.tokens)
        rows = frontier(bench)
        others = compared(bench, given.at, given.minutes, Path(folder))
    name = f"frontier-{Path(str(given.model)).name}-{given.method}"
    write(work_folder(given.out), name, report(bench, rows, others, given.threads), {"frontier": rows, "planners": others})


if __name__ == "__main__":
    main()
