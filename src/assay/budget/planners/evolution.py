"""Search over whole plans: levels are switched between decisions at equal bytes, and what measures best survives.

Damage need not add up. Offspring are judged in stages, few tokens for many of them and all tokens for the last (EvoPress:
Accurate Dynamic Model Compression via Evolutionary Search, 2024). Unlike there, options may have any sizes: what a
promotion costs is paid by random others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from assay.budget.menu import Decision
from assay.budget.planners import lagrange
from assay.budget.table import Table

Choice = tuple[int, ...]
OFFSPRING = 128
UNMEASURED = 32
GENERATIONS = 24
STEPS = 10_000_000
"""Without a model: offspring, generations, and decisions times offspring at most."""
PROVEN = 1e-12
"""Relative distance to the lower bound at which nothing is left to find."""
ATTEMPTS = 2
SINGLE = 0.6
"""Share of promotions by one step; the others go two or three."""
SPENT_ON = 8


class Fitness(Protocol):
    """Measures plans; smaller is better."""

    def __call__(self, choices: Sequence[Choice], share: float, draw: int) -> Sequence[float]:
        """Loss of each choice on one and the same share of the text, 0 to 1; `draw` says which part of it."""
        ...


@dataclass(frozen=True)
class Stage:
    """How many offspring survive a measurement on a share of the text."""

    survivors: int
    share: float


STAGES = (Stage(16, 1 / 64), Stage(4, 1 / 8), Stage(1, 1.0))


@dataclass(frozen=True)
class Parent:
    """The best choice so far, its loss on the whole text, and how many generations it took."""

    choice: Choice
    loss: float
    generation: int


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """A search by additive damage, where no model is at hand: `lagrange`, and what a short search finds to improve.

    Never above `budget` bytes, never more damage than the best uniform level that fits. Raises InputError.
    """
    start = tuple(lagrange.plan(decisions, budget))
    table = Table.of(decisions)

    def damage(choices: Sequence[Choice], share: float, draw: int) -> list[float]:
        return [table.damage_of(np.array(choice, dtype=np.int64)) for choice in choices]

    first = Parent(start, damage([start], 1.0, 0)[0], 0)
    if first.loss <= lagrange.dual(table, budget)[0] * (1 + PROVEN):
        return list(start)
    rounds = min(GENERATIONS, STEPS // (UNMEASURED * max(len(decisions), 1)))
    found = evolve(decisions, budget, damage, first, 0, UNMEASURED, (Stage(1, 1.0),))
    best = first
    for _ in range(rounds):
        best = next(found)
    return list(best.choice)


def evolve(
    decisions: Sequence[Decision], budget: int, fitness: Fitness, parent: Parent, seed: int,
    offspring: int = OFFSPRING, stages: Sequence[Stage] = STAGES,
) -> Iterator[Parent]:  # fmt: skip
    """The parent after each further generation, without end; its loss never rises, its bytes stay within `budget`.

    The last stage is for offspring that beat the parent in the one before it; its share is the whole text.
    Generation n depends on its parent, `seed` and n only, so a search continues from any parent as if it never stopped.
    """
    sizes = [[option.nbytes for option in d.options] for d in decisions]
    while True:
        number = parent.generation + 1
        room = budget - sum(row[c] for row, c in zip(sizes, parent.choice, strict=True))
        alive = _offspring(sizes, parent.choice, room, offspring, random.Random(f"{seed}:{number}"))
        losses: Sequence[float] = []
        for index, stage in enumerate(stages):
            rival = [parent.choice] if index == len(stages) - 2 and stage.share else []
            losses = fitness([*alive, *rival], stage.share, len(stages) * number + index) if alive else []
            order = [k for k in np.argsort(losses, kind="stable").tolist() if not rival or losses[k] < losses[-1]]
            kept = order[: stage.survivors]
            alive, losses = [alive[k] for k in kept], [losses[k] for k in kept]
        better = bool(alive) and losses[0] < parent.loss
        parent = Parent(alive[0], float(losses[0]), number) if better else Parent(parent.choice, parent.loss, number)
        yield parent


def _offspring(sizes: list[list[int]], parent: Choice, room: int, count: int, chance: random.Random) -> list[Choice]:
    """Up to `count` different plans near `parent`, which leaves `room` bytes. sizes: of every option."""
    found: dict[Choice, None] = {}
    for _ in range(ATTEMPTS * count if len(sizes) > 1 else 0):
        child = tuple(_mutated(sizes, list(parent), room, chance))
        if child != parent:
            found[child] = None
        if len(found) == count:
            break
    return list(found)


def _mutated(sizes: list[list[int]], choice: list[int], left: int, chance: random.Random) -> list[int]:
    """One to three random promotions by a step or more, paid by random demotions; bytes left are spent at random."""
    raised: set[int] = set()
    for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
        index = chance.randrange(len(choice))
        target = min(choice[index] + (1 if chance.random() < SINGLE else chance.randint(2, 3)), len(sizes[index]) - 1)
        left -= sizes[index][target] - sizes[index][choice[index]]
        choice[index] = target
        raised.add(index)
    while left < 0:
        index = _lowered(choice, raised, chance)
        choice[index] -= 1
        left += sizes[index][choice[index] + 1] - sizes[index][choice[index]]
    for index in (chance.randrange(len(choice)) for _ in range(SPENT_ON)):
        more = sizes[index][choice[index] + 1] - sizes[index][choice[index]] if choice[index] + 1 < len(sizes[index]) else 0
        if 0 < more <= left:
            choice[index] += 1
            left -= more
    return choice


def _lowered(choice: list[int], raised: set[int], chance: random.Random) -> int:
    """A random decision that isn't at its smallest option; one of `raised` only where there is no other."""
    for _ in range(SPENT_ON):
        index = chance.randrange(len(choice))
        if choice[index] and index not in raised:
            return index
    able = [i for i, c in enumerate(choice) if c]
    return chance.choice([i for i in able if i not in raised] or able)
