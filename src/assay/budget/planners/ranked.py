"""Two levels: decisions are promoted from the lower to the higher one in the order of a ranking, while bytes last.

How layer scores become bits (Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer
Bit-Levels, 2024). Without scores the ranking is damage saved per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible, uniform
from assay.budget.table import Floats, Ints, Table

Rank = Callable[[Ints, Ints], Floats]
"""Scores [decisions] of a promotion between two choices; the highest comes first."""


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The best pair of levels, promoted by damage saved per byte.

    Never above `budget` bytes, never more damage than the best uniform level that fits. Raises InputError.
    """
    refuse_impossible(decisions, budget)
    table = Table.of(decisions)

    def saved(low: Ints, high: Ints) -> Floats:
        extra = table.nbytes[table.rows, high] - table.nbytes[table.rows, low]
        return (table.damage[table.rows, low] - table.damage[table.rows, high]) / np.maximum(extra, 1)

    return _best_pair(table, budget, saved).tolist()


def by_scores(decisions: Sequence[Decision], scores: Sequence[float], budget: int) -> list[int]:
    """The same with a ranking from elsewhere: the decisions of the highest scores get the higher level.

    scores: one a decision, finite. Damage only decides which two levels. Raises InputError when nothing fits.
    """
    refuse_impossible(decisions, budget)
    fixed = np.array(scores, dtype=np.float64)
    return _best_pair(Table.of(decisions), budget, lambda low, high: fixed).tolist()


def promote(table: Table, low: Ints, high: Ints, scores: Floats, budget: int) -> Ints:
    """`low` with the longest prefix of the ranking at `high` that fits. Equal scores: the earlier decision first."""
    extra = table.nbytes[table.rows, high] - table.nbytes[table.rows, low]
    order = np.argsort(-scores, kind="stable")
    order = order[extra[order] > 0]
    fit = int(np.searchsorted(np.cumsum(extra[order]), budget - table.bytes_of(low), side="right"))
    choice = low.copy()
    choice[order[:fit]] = high[order[:fit]]
    return choice


def _best_pair(table: Table, budget: int, rank: Rank) -> Ints:
    """The promotion of least damage between a single level that fits and one that doesn't."""
    flat = [uniform.at(table, level) for level in range(len(table.levels))]
    flat += [kept for alike in flat if not np.array_equal(kept := np.where(table.inside, alike, table.count - 1), alike)]
    fits = [table.bytes_of(choice) <= budget for choice in flat]
    lows = [np.zeros_like(table.count), *(choice for choice, fit in zip(flat, fits, strict=True) if fit)]
    highs = [choice for choice, fit in zip(flat, fits, strict=True) if not fit]
    found = [promote(table, low, high, rank(low, high), budget) for low in lows for high in highs]
    return uniform.or_better(table, min([*lows, *found], key=table.damage_of), budget)
