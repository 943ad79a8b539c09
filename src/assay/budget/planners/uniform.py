"""One level for everything: what people do by habit, and what every plan must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import refuse_impossible
from assay.budget.table import Floats, Ints, Table
from assay.model.errors import InputError

LIKELY = 1.25


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The single level with the least damage that fits `budget` bytes. Raises InputError.

    A decision without the level takes its next larger option; what lies outside the blocks is kept
    if that fits, and else treated alike. Where no level fits everything takes its smallest option.
    """
    refuse_impossible(decisions, budget)
    return best(Table.of(decisions), budget).tolist()


def likely(decisions: Sequence[Decision], budget: int) -> set[str]:
    """The levels that `plan` can come to, where damages are roughly known."""
    choices = Flats.of(Table.of(decisions)).likely(budget)
    found = {d.options[option].level for choice in choices for d, option in zip(decisions, choice, strict=True)}
    return {level for level in found if level is not None}


def plan_for_loss(decisions: Sequence[Decision], max_damage: float) -> list[int]:
    """The single level of fewest bytes with a damage of at most `max_damage` nats per token. Raises InputError."""
    flats = Flats.of(Table.of(decisions))
    held = np.flatnonzero(flats.damage <= max_damage)
    if not len(held):
        raise InputError(f"a damage of {max_damage} nats per token is out of reach; the least is {flats.damage.min()}")
    return [int(option) for option in flats.choices[held[flats.nbytes[held].argmin()]]]


def best(table: Table, budget: int) -> Ints:
    """`plan` on a table whose smallest options fit `budget` bytes."""
    return Flats.of(table).best(budget)


@dataclass(frozen=True)
class Flats:
    """Every single level of a menu: first the smallest options, then each level with what lies outside the blocks and without.

    choices: int64 [flats, decisions]; nbytes: int64 [flats]; damage: float64 [flats], nats per token.
    """

    choices: Ints
    nbytes: Ints
    damage: Floats

    @classmethod
    def of(cls, table: Table) -> Flats:
        """Those of a table."""
        found = [np.zeros_like(table.count)]
        for level in np.unique(table.level).tolist():
            alike = at(table, level)
            found += [alike, np.where(table.inside, alike, table.count - 1)]
        nbytes, damage = [table.bytes_of(c) for c in found], [table.damage_of(c) for c in found]
        return cls(np.stack(found), np.array(nbytes), np.array(damage))

    def best(self, budget: int) -> Ints:
        """The one with the least damage within `budget` bytes; the smallest options where none fits."""
        fitting = np.flatnonzero(self.nbytes <= budget)
        order = np.lexsort((self.nbytes[fitting], self.damage[fitting]))
        return self.choices[fitting[order[0]]] if len(fitting) else self.choices[0]

    def likely(self, budget: int) -> Ints:
        """Those within `budget` bytes, and within `LIKELY` times the damage of the best one: damages that are roughly known."""
        fitting = np.flatnonzero(self.nbytes <= budget)
        least = self.damage[fitting].min(initial=np.inf)
        return self.choices[fitting[self.damage[fitting] <= LIKELY * least]] if len(fitting) else self.choices[:1]

    def or_better(self, table: Table, choice: Ints, budget: int) -> Ints:
        """See the function."""
        flat = self.best(budget)
        return choice if table.damage_of(choice) <= table.damage_of(flat) else flat


def or_better(table: Table, choice: Ints, budget: int) -> Ints:
    """`choice`, or the best single level that fits where that does less damage."""
    return Flats.of(table).or_better(table, choice, budget)


def at(table: Table, level: int) -> Ints:
    """Option of every decision at a level, or its next larger one in bytes per weight."""
    same = table.level == level
    choice, has = same.argmax(1), same.any(1)
    per_weight = table.nbytes / np.maximum(table.weights, 1)[:, None]
    lacking = np.flatnonzero(~has)
    larger = per_weight[lacking] >= per_weight[same].min()
    choice[lacking] = np.where(larger.any(1), larger.argmax(1), table.count[lacking] - 1)
    return choice
