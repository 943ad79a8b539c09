"""One threshold of damage per weight: every decision takes its smallest option below it, and the threshold is bisected.

Towards a budget, or towards a floor under the accuracy, which may be measured (Augmenting Hessians with Inter-Layer
Dependencies for Mixed-Precision Post-Training Quantization, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible, uniform
from assay.budget.table import Floats, Ints, Table
from assay.model.errors import InputError


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The lowest threshold whose options fit `budget` bytes.

    Never more damage than the best uniform level that fits. Raises InputError.
    """
    refuse_impossible(decisions, budget)
    if not decisions:
        return []
    table = Table.of(decisions)
    values, share = _thresholds(table)
    found = _first(len(values) - 1, lambda i: table.bytes_of(_below(share, values[i])) <= budget)
    return uniform.or_better(table, _below(share, values[found]), budget).tolist()


def plan_for_loss(decisions: Sequence[Decision], max_damage: float) -> list[int]:
    """The highest threshold with a total damage of at most `max_damage` nats per token. Raises InputError."""
    table = Table.of(decisions)
    return to_floor(decisions, lambda choice: table.damage_of(np.array(choice, dtype=np.int64)) <= max_damage)


def to_floor(decisions: Sequence[Decision], holds: Callable[[list[int]], bool]) -> list[int]:
    """The options of the highest threshold at which `holds` says yes, if it says no to all above and yes to all below.

    `holds` may run the model: of n thresholds it sees at most ceil(log2(n)) + 1, and the one that is returned is among
    them. Raises InputError where it says no even to the options of most bytes.
    """
    table = Table.of(decisions)
    values, share = _thresholds(table)
    choices = [lambda t=t: _below(share, t).tolist() for t in values[::-1]]
    if not choices:
        return []
    found = _first(len(choices), lambda i: holds(choices[i]()))
    if found == len(choices):
        raise InputError("the floor is out of reach: even the options of most bytes do not hold it")
    return choices[found]()


def _thresholds(table: Table) -> tuple[Floats, Floats]:
    """(rising thresholds at which a choice changes, damage per weight of every option)."""
    share = table.damage / np.maximum(table.weights, 1)[:, None]
    return np.unique(share), share


def _below(share: Floats, threshold: float) -> Ints:
    """The first option of every decision with damage per weight of at most `threshold`."""
    return (share <= threshold).argmax(1)


def _first(last: int, holds: Callable[[int], bool]) -> int:
    """The least index where `holds`, which goes from no to yes once; `last` where that is at or after it."""
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
