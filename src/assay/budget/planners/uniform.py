"""One level for everything: what people do by habit, and what every plan must beat."""

from __future__ import annotations

from collections.abc import Sequence

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The single level with the least damage that fits `budget` bytes. Raises InputError.

    A decision without the level takes its next larger option; what lies outside the blocks is kept
    if that fits, and else treated alike.
    """
    refuse_impossible(decisions, budget)
    levels = {o.level for d in decisions for o in d.options}
    trials = [[0] * len(decisions)]
    for level in levels:
        size = _bits_of(decisions, level)
        for outside in (False, True):
            trials.append([_index(d, level, size) if d.inside or outside else len(d.options) - 1 for d in decisions])
    fitting = [t for t in trials if _bytes(decisions, t) <= budget]
    return min(fitting, key=lambda t: (_damage(decisions, t), _bytes(decisions, t), t))


def _bits_of(decisions: Sequence[Decision], level: str | None) -> float:
    found = [o.nbytes / d.count for d in decisions for o in d.options if o.level == level]
    return min(found, default=0.0)


def _index(decision: Decision, level: str | None, bytes_per_weight: float) -> int:
    for index, option in enumerate(decision.options):
        if option.level == level:
            return index
    larger = [i for i, o in enumerate(decision.options) if o.nbytes / decision.count >= bytes_per_weight]
    return larger[0] if larger else len(decision.options) - 1


def _bytes(decisions: Sequence[Decision], choice: list[int]) -> int:
    return sum(d.options[c].nbytes for d, c in zip(decisions, choice, strict=True))


def _damage(decisions: Sequence[Decision], choice: list[int]) -> float:
    return sum(d.options[c].damage for d, c in zip(decisions, choice, strict=True))
