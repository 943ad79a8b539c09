"""The least damage by dynamic programming over a grid of bytes: what the decisions so far can do with so many cells.

Damage adds up over decisions and need not be convex in bytes (Efficient Joint Optimization of Layer-Adaptive Weight
Pruning in Deep Neural Networks, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import integer, lagrange, refuse_impossible
from assay.budget.table import Ints, Table

CELLS = 1 << 20
WORK = 1 << 28
"""Cells times options, and cells times decisions in bytes: a few seconds and a quarter of a GiB at most."""


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The least damage within `budget` bytes, exact while the bytes' common divisor gives few enough cells.

    Beyond that bytes are rounded up to cells, and what is returned is no worse than `lagrange`. Options that the Lagrangian
    dual proves to be in no better plan are left out first. Raises InputError.
    """
    refuse_impossible(decisions, budget)
    table, best = Table.of(decisions), np.array(lagrange.plan(decisions, budget), dtype=np.int64)
    bound, price = lagrange.dual(table, budget)
    gap = table.damage_of(best) - bound
    if gap <= integer.CLOSE * table.damage_of(best):
        return best.tolist()
    choice = _solve(table, best, budget, *integer.hopeful(table, best, price, gap))
    choice = lagrange.fill(decisions, table, choice, budget - table.bytes_of(choice))
    return (choice if table.damage_of(choice) < table.damage_of(best) else best).tolist()


def _solve(table: Table, best: Ints, budget: int, owner: Ints, option: Ints) -> Ints:
    """The best of the options (owner, option), sorted by owner, that fit on the grid; elsewhere those of `best`."""
    owners, first, count = np.unique(owner, return_index=True, return_counts=True)
    size = table.nbytes[owner, option]
    smallest = np.minimum.reduceat(size, first)
    extra = size - np.repeat(smallest, count)
    room = budget - int(smallest.sum())
    cells, unit = _grid(extra, room, len(owners))
    needed = -(-extra // unit)
    ends = first + count
    damage, picked = np.zeros(cells + 1), np.zeros((len(owners), cells + 1), dtype=np.int16)
    for i, (start, end) in enumerate(zip(first.tolist(), ends.tolist(), strict=True)):
        damage = _add(damage, needed[start:end].tolist(), table.damage[owner[start:end], option[start:end]].tolist(), picked[i])
    choice, left = best.copy(), cells
    for i in range(len(owners) - 1, -1, -1):
        at = int(first[i]) + int(picked[i, left])
        choice[owners[i]] = option[at]
        left -= int(needed[at])
    return choice


def _grid(extra: Ints, room: int, decisions: int) -> tuple[int, int]:
    """(cells, bytes of a cell) for `room` bytes."""
    unit = max(1, int(np.gcd.reduce(extra)))
    most = max(1, min(CELLS, WORK // len(extra), WORK // (2 * max(decisions, 1))))
    unit = max(unit, -(-room // most)) if room // unit > most else unit
    return room // unit, unit


def _add(before: np.ndarray, needed: list[int], damages: list[float], picked: np.ndarray) -> np.ndarray:
    """Least damage [cells + 1] with one more decision, whose options are written to `picked` [cells + 1]."""
    after = np.full(len(before), np.inf)
    for index, (cells, damage) in enumerate(zip(needed, damages, strict=True)):
        if cells < len(before):
            found = before[: len(before) - cells] + damage
            better = found < after[cells:]
            after[cells:][better] = found[better]
            picked[cells:][better] = index
    return after
