"""Lower convex hull of each decision's options and one price of a byte for all of them.

Shoham & Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers (1988).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible, uniform
from assay.budget.planners._hull import hulls
from assay.budget.table import Floats, Ints, Table
from assay.model.errors import InputError


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """Hull steps by falling gain per byte while they fit, then single upgrades with the bytes left.

    Never above `budget` bytes, never more damage than the best uniform level that fits, and above
    `lower_bound` by less than the damage that one hull step takes away. Raises InputError.
    """
    refuse_impossible(decisions, budget)
    return Prepared.of(decisions, Table.of(decisions)).plan(budget).tolist()


def plan_for_loss(decisions: Sequence[Decision], max_damage: float) -> list[int]:
    """Few bytes with total damage of at most `max_damage` nats per token.

    The bytes are above the least possible by less than those of one hull step. Raises InputError when even
    the options of most bytes do more damage.
    """
    table = Table.of(decisions)
    least = table.damage_of(table.count - 1)
    if not max_damage >= least:
        raise InputError(f"a damage of {max_damage} nats per token is out of reach; the least is {least}")
    choice = np.zeros_like(table.count)
    steps = _steps(table)
    final = choice.copy()
    final[steps.owner] = steps.target
    before = table.damage_of(final) + np.cumsum(steps.gain[::-1])[::-1]
    needed = int(np.searchsorted(-before, -max_damage))
    choice[steps.owner[:needed]] = steps.target[:needed]
    for owner, target in zip(steps.owner[needed:], steps.target[needed:], strict=True):
        if table.damage_of(choice) <= max_damage:
            break
        choice[owner] = target
    trimmed = _trim(table, choice, max_damage)
    fitting = [c for c in (trimmed, choice) if table.damage_of(c) <= max_damage]
    return (fitting or [table.count - 1])[0].tolist()


def lower_bound(decisions: Sequence[Decision], budget: int) -> float:
    """No choice within `budget` bytes has less damage than this many nats per token.

    The Lagrangian dual at its best multiplier. Raises InputError when nothing fits.
    """
    refuse_impossible(decisions, budget)
    return dual(Table.of(decisions), budget)[0]


def dual(table: Table, budget: int) -> tuple[float, float]:
    """(lower bound in nats per token, its multiplier in nats per token and byte) at `budget` bytes."""
    choice = np.zeros_like(table.count)
    steps = _steps(table)
    spent = table.bytes_of(choice) + np.cumsum(steps.extra)
    fit = int(np.searchsorted(spent, budget, side="right"))
    choice[steps.owner[:fit]] = steps.target[:fit]
    damage = table.damage_of(choice)
    if fit == len(spent):
        return max(0.0, damage), 0.0
    price = float(steps.gain[fit] / steps.extra[fit])
    left = budget - int(spent[fit] - steps.extra[fit])
    return max(0.0, damage - price * left), price


def on_hulls(table: Table) -> list[list[int]]:
    """The options of every decision that lie on its lower convex hull, by rising bytes."""
    found = [[0] for _ in range(len(table.count))]
    steps = _steps(table)
    for owner, target in sorted(zip(steps.owner.tolist(), steps.target.tolist(), strict=True)):
        found[owner].append(target)
    return found


@dataclass(frozen=True)
class Steps:
    """Moves to a decision's next hull point, by falling gain per byte. extra: bytes; gain: nats per token."""

    owner: Ints
    target: Ints
    extra: Ints
    gain: Floats


def _steps(table: Table) -> Steps:
    """Those of all hulls. Of equal gain per byte: by decision, and along each hull."""
    target, slope, length = np.zeros_like(table.nbytes), np.zeros_like(table.damage), np.zeros_like(table.count)
    hulls(table.nbytes, table.damage, table.count, target, slope, length)
    owner, step = np.nonzero(np.arange(target.shape[1]) < length[:, None])
    order = np.argsort(-slope[owner, step], kind="stable")
    owner, step = owner[order], step[order]
    to = target[owner, step]
    start = np.where(step > 0, target[owner, step - 1], 0)
    extra, gain = table.nbytes[owner, to] - table.nbytes[owner, start], table.damage[owner, start] - table.damage[owner, to]
    return Steps(owner, to, extra, gain)


@dataclass(frozen=True)
class Prepared:
    """A menu with all that doesn't depend on the budget, for many budgets in turn."""

    decisions: Sequence[Decision]
    table: Table
    steps: Steps
    flats: uniform.Flats

    @classmethod
    def of(cls, decisions: Sequence[Decision], table: Table) -> Prepared:
        """table: that of the decisions."""
        return cls(decisions, table, _steps(table), uniform.Flats.of(table))

    def plan(self, budget: int) -> Ints:
        """`plan` for a budget that the smallest options fit, in bytes; int64 [decisions]."""
        choice = fill(self.decisions, self.table, *self._climb(budget))
        return self.flats.or_better(self.table, choice, budget)

    def on_hull(self, budget: int) -> Ints:
        """The hull steps that fit up to the first that doesn't: `plan` without what the bytes left would buy."""
        return self._first(budget)[0]

    def _first(self, budget: int) -> tuple[Ints, int]:
        choice, steps = np.zeros_like(self.table.count), self.steps
        spent = self.table.bytes_of(choice) + np.cumsum(steps.extra)
        fit = int(np.searchsorted(spent, budget, side="right"))
        choice[steps.owner[:fit]] = steps.target[:fit]
        return choice, fit

    def _climb(self, budget: int) -> tuple[Ints, int]:
        """(choice, bytes left) after the hull steps that fit; a decision stops at its first that doesn't."""
        (choice, fit), steps = self._first(budget), self.steps
        left = budget - self.table.bytes_of(choice)
        smallest = np.minimum.accumulate(steps.extra[fit:][::-1])[::-1]
        blocked: set[int] = set()
        for i in range(fit, len(steps.extra)):
            owner, extra = int(steps.owner[i]), int(steps.extra[i])
            if smallest[i - fit] > left:
                break
            if owner in blocked or extra > left:
                blocked.add(owner)
                continue
            choice[owner], left = steps.target[i], left - extra
        return choice, left


def fill(decisions: Sequence[Decision], table: Table, choice: Ints, left: int) -> Ints:
    """`choice` with `left` bytes spent on the single upgrades that gain most per byte, off the hull as well."""
    choice, rows = choice.copy(), table.rows
    following = np.minimum(choice + 1, table.count - 1)
    extra = table.nbytes[rows, following] - table.nbytes[rows, choice]
    near = np.flatnonzero((following > choice) & (extra <= left)).tolist()
    queue = [u for i in near if (u := _upgrade(decisions[i], int(choice[i]), i, left))]
    heapq.heapify(queue)
    while queue:
        _, index, target = heapq.heappop(queue)
        options, current = decisions[index].options, int(choice[index])
        needed = options[target].nbytes - options[current].nbytes
        if needed <= left:
            choice[index], left = target, left - needed
        if again := _upgrade(decisions[index], int(choice[index]), index, left):
            heapq.heappush(queue, again)
    return choice


def _upgrade(decision: Decision, current: int, index: int, left: int) -> tuple[float, int, int] | None:
    """(damage per byte, decision, option) of the upgrade that gains most per byte within `left` bytes."""
    size, damage = decision.options[current].nbytes, decision.options[current].damage
    found = [
        ((o.damage - damage) / (o.nbytes - size), index, k)
        for k, o in enumerate(decision.options[current + 1 :], current + 1)
        if size < o.nbytes <= size + left and o.damage < damage
    ]
    return min(found, default=None)


def _trim(table: Table, choice: Ints, max_damage: float) -> Ints:
    """Undo upgrades, largest decision first, while the damage stays within its bound."""
    choice, damage = choice.copy(), table.damage_of(choice)
    order = np.argsort(-table.nbytes[table.rows, choice], kind="stable")
    least = np.where(np.arange(table.damage.shape[1]) < choice[:, None], table.damage, np.inf).min(1)
    more = least - table.damage[table.rows, choice]
    for index in order[more[order] <= max_damage - damage].tolist():
        current = int(choice[index])
        room = max_damage - damage + table.damage[index, current]
        smaller = np.flatnonzero(table.damage[index, :current] <= room)
        if len(smaller):
            damage += float(table.damage[index, smaller[0]] - table.damage[index, current])
            choice[index] = smaller[0]
    return choice
