"""Planners at scale: 100,000 groups with 20 options each on one core, beside the bound of the linear program.

python benchmarks/planners.py [--groups 100000] [--options 20] [--only lagrange integer]

The table is drawn like a real one: matrices of many sizes, costs over four decades, damage near cost x 4^-bits, levels of
several group sizes. The bound is the dual of the program whose choices may be fractions: no plan is below it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from _harness import arguments, machine, table, work_folder, write

from assay.budget import planners
from assay.budget.menu import Decision, Option
from assay.budget.planners import lagrange

GROUP_BITS = (0.0625, 0.14, 0.28, 0.56)


def menu(groups: int, options: int, seed: int = 0) -> list[Decision]:
    """Decisions with `options` options each, the last of which keeps 16 bits."""
    chance = np.random.default_rng(seed)
    weights = 2 ** chance.integers(16, 24, groups)
    cost = 10 ** chance.uniform(-9, -5, groups)
    bits = np.sort([b + g for b in range(2, 9) for g in GROUP_BITS])[: options - 1]
    damage = np.sort(cost[:, None] * weights[:, None] * 4.0**-bits * np.exp(chance.normal(0, 0.2, (groups, len(bits)))))
    nbytes = (weights[:, None] * bits / 8).astype(int)
    return [
        Decision(str(i), (str(i),), int(weights[i]), True, (
            *(Option(f"l{k}", b, d) for k, (b, d) in enumerate(zip(nbytes[i].tolist(), damage[i, ::-1].tolist(), strict=True))),
            Option(None, int(weights[i]) * 2, 0.0),
        ))
        for i in range(groups)
    ]  # fmt: skip


def measure(name: str, decisions: list[Decision], bits: float) -> dict[str, Any]:
    """One planner at an average of `bits`."""
    budget = int(sum(d.count for d in decisions) * bits / 8)
    begun, cpu = time.perf_counter(), time.process_time()
    choice = planners.get(name).plan(decisions, budget)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    picked = [d.options[c] for d, c in zip(decisions, choice, strict=True)]
    damage, bound = sum(o.damage for o in picked), lagrange.lower_bound(decisions, budget)
    return {
        "planner": name, "bits": bits, "seconds": seconds, "cpu_seconds": cpu, "damage": damage, "bound": bound,
        "above": damage / bound - 1, "left": budget - sum(o.nbytes for o in picked),
    }  # fmt: skip


def main() -> None:
    """Every planner on one table."""
    parser = arguments(__doc__)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--options", type=int, default=20)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.5, 5.0])
    parser.add_argument("--only", nargs="+", default=planners.names())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lagrange.plan(menu(2, given.options), 1 << 30)  # compiles
    decisions = menu(given.groups, given.options)
    rows = [measure(name, decisions, bits) for name in given.only for bits in given.bits]
    lines = [
        [r["planner"], r["bits"], f"{r['seconds']:.2f}", f"{r['cpu_seconds']:.2f}", f"{r['above']:.2e}", f"{r['left']:,}"]
        for r in rows
    ]
    header = ("planner", "bits", "seconds", "CPU seconds", "above the LP bound", "bytes left")
    title = f"{given.groups:,} groups, {given.options} options each"
    write(work_folder(given.out), "planners", "\n\n".join([title, machine(given.threads), table(header, lines)]), rows)


if __name__ == "__main__":
    main()
