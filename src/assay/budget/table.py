"""Menus as arrays, so that a planner can look at every option of every decision at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from assay.budget.menu import Decision

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Options of all decisions, [decisions, most options]; shorter rows repeat their last option.

    nbytes: bytes; damage: nats per token; level: index into `levels`; count: options; weights: number of
    weights; inside: within the transformer blocks.
    """

    nbytes: Ints
    damage: Floats
    level: Ints
    levels: tuple[str | None, ...]
    count: Ints
    weights: Ints
    inside: NDArray[np.bool_]

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> Table:
        """The table of a menu."""
        count = np.array([len(d.options) for d in decisions], dtype=np.int64)
        width = int(count.max(initial=1))
        places = (np.cumsum(count) - count)[:, None] + np.minimum(np.arange(width), count[:, None] - 1)
        options = list(chain.from_iterable(d.options for d in decisions))
        names = list(map(attrgetter("level"), options))
        levels = {name: index for index, name in enumerate(dict.fromkeys(names))}
        return cls(
            np.fromiter(map(attrgetter("nbytes"), options), np.int64, len(options))[places],
            np.fromiter(map(attrgetter("damage"), options), np.float64, len(options))[places],
            np.fromiter(map(levels.__getitem__, names), np.int64, len(options))[places],
            tuple(levels),
            count,
            np.array([d.count for d in decisions], dtype=np.int64),
            np.array([d.inside for d in decisions], dtype=bool),
        )

    @property
    def rows(self) -> Ints:
        """Index of every decision."""
        return np.arange(len(self.count))

    def bytes_of(self, choice: Ints) -> int:
        """Total bytes of one option per decision."""
        return int(self.nbytes[self.rows, choice].sum())

    def damage_of(self, choice: Ints) -> float:
        """Total damage of one option per decision, nats per token."""
        return float(self.damage[self.rows, choice].sum())
