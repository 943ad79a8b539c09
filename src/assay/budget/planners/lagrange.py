"""Lower convex hull of each decision's options and one price of a byte for all of them.

Shoham & Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers (1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible, uniform


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """Hull steps by falling gain per byte while they fit, then single upgrades with the bytes left.

    Never above `budget` bytes and never more damage than the best uniform level that fits. Raises InputError.
    """
    refuse_impossible(decisions, budget)
    choice, spent = [0] * len(decisions), sum(d.options[0].nbytes for d in decisions)
    blocked: set[int] = set()
    for decision, target in _steps(decisions):
        extra = decisions[decision].options[target].nbytes - decisions[decision].options[choice[decision]].nbytes
        if decision in blocked or spent + extra > budget:
            blocked.add(decision)
            continue
        choice[decision], spent = target, spent + extra
    choice = _fill(decisions, choice, budget - spent)
    flat = uniform.plan(decisions, budget)
    return choice if _damage(decisions, choice) <= _damage(decisions, flat) else flat


def plan_for_loss(decisions: Sequence[Decision], max_damage: float) -> list[int]:
    """Few bytes with total damage of at most `max_damage` nats per token."""
    choice = [0] * len(decisions)
    damage = _damage(decisions, choice)
    for decision, target in _steps(decisions):
        if damage <= max_damage:
            break
        options = decisions[decision].options
        damage -= options[choice[decision]].damage - options[target].damage
        choice[decision] = target
    return _trim(decisions, choice, max_damage)


def lower_bound(decisions: Sequence[Decision], budget: int) -> float:
    """No choice within `budget` bytes has less damage than this (the Lagrangian dual at its best multiplier)."""
    spent = sum(d.options[0].nbytes for d in decisions)
    damage = _damage(decisions, [0] * len(decisions))
    at = [0] * len(decisions)
    for decision, target in _steps(decisions):
        options = decisions[decision].options
        extra = options[target].nbytes - options[at[decision]].nbytes
        gain = options[at[decision]].damage - options[target].damage
        if spent + extra > budget:
            return max(0.0, damage - gain * (budget - spent) / extra)
        at[decision], spent, damage = target, spent + extra, damage - gain
    return max(0.0, damage)


def _steps(decisions: Sequence[Decision]) -> list[tuple[int, int]]:
    """(decision, next option on its hull) by falling gain per byte."""
    owner, target, slope = [], [], []
    for index, decision in enumerate(decisions):
        hull = _hull(decision)
        for a, b in zip(hull, hull[1:], strict=False):
            low, high = decision.options[a], decision.options[b]
            owner.append(index)
            target.append(b)
            slope.append((low.damage - high.damage) / (high.nbytes - low.nbytes))
    order: NDArray[np.intp] = np.argsort(-np.asarray(slope), kind="stable")
    return [(owner[i], target[i]) for i in order]


def _hull(decision: Decision) -> list[int]:
    """Indices on the lower convex hull of (bytes, damage), from the smallest option on."""
    hull: list[int] = []
    points = [(o.nbytes, o.damage) for o in decision.options]
    for index, (x, y) in enumerate(points):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(index)
    return hull


def _fill(decisions: Sequence[Decision], choice: list[int], left: int) -> list[int]:
    """Spend the bytes left on the single upgrades that gain most per byte, off the hull as well."""
    choice = list(choice)
    queue = [u for i in range(len(decisions)) if (u := _upgrade(decisions, choice, i, left))]
    heapq.heapify(queue)
    while queue:
        _, index, target = heapq.heappop(queue)
        extra = decisions[index].options[target].nbytes - decisions[index].options[choice[index]].nbytes
        if 0 < extra <= left and target > choice[index]:
            choice[index], left = target, left - extra
        if again := _upgrade(decisions, choice, index, left):
            heapq.heappush(queue, again)
    return choice


def _upgrade(decisions: Sequence[Decision], choice: list[int], index: int, left: int) -> tuple[float, int, int] | None:
    options, current = decisions[index].options, choice[index]
    found = [
        ((o.damage - options[current].damage) / (o.nbytes - options[current].nbytes), index, k)
        for k, o in enumerate(options)
        if k > current and o.nbytes - options[current].nbytes <= left
    ]
    return min(found, default=None)


def _trim(decisions: Sequence[Decision], choice: list[int], max_damage: float) -> list[int]:
    """Undo upgrades, largest saving first, while the damage stays within its bound."""
    choice, damage = list(choice), _damage(decisions, choice)
    order = sorted(range(len(decisions)), key=lambda i: -decisions[i].options[choice[i]].nbytes)
    for index in order:
        options = decisions[index].options
        for smaller in range(choice[index]):
            more = options[smaller].damage - options[choice[index]].damage
            if damage + more <= max_damage:
                choice[index], damage = smaller, damage + more
                break
    return choice


def _damage(decisions: Sequence[Decision], choice: Sequence[int]) -> float:
    return sum(d.options[c].damage for d, c in zip(decisions, choice, strict=True))
