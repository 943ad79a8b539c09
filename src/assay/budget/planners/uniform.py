"""One level for everything: what people do by habit, and what every plan must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible
from assay.budget.table import Ints, Table


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The single level with the least damage that fits `budget` bytes. Raises InputError.

    A decision without the level takes its next larger option; what lies outside the blocks is kept
    if that fits, and else treated alike. Where no level fits everything takes its smallest option.
    """
    refuse_impossible(decisions, budget)
    return best(Table.of(decisions), budget).tolist()


def best(table: Table, budget: int) -> Ints:
    """`plan` on a table whose smallest options fit `budget` bytes."""
    found = np.zeros_like(table.count)
    merit = table.damage_of(found), table.bytes_of(found)
    for level in range(len(table.levels)):
        alike = at(table, level)
        for trial in (alike, np.where(table.inside, alike, table.count - 1)):
            size = table.bytes_of(trial)
            if size <= budget and (table.damage_of(trial), size) < merit:
                found, merit = trial, (table.damage_of(trial), size)
    return found


def or_better(table: Table, choice: Ints, budget: int) -> Ints:
    """`choice`, or the best single level that fits where that does less damage."""
    flat = best(table, budget)
    return choice if table.damage_of(choice) <= table.damage_of(flat) else flat


def at(table: Table, level: int) -> Ints:
    """Option of every decision at a level, or its next larger one in bytes per weight."""
    same = table.level == level
    choice, has = same.argmax(1), same.any(1)
    per_weight = table.nbytes / np.maximum(table.weights, 1)[:, None]
    lacking = np.flatnonzero(~has)
    larger = per_weight[lacking] >= per_weight[same].min()
    choice[lacking] = np.where(larger.any(1), larger.argmax(1), table.count[lacking] - 1)
    return choice
