"""Heavy hitters: half the budget for the latest tokens, half for those that received most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from assay.methods.cache._evict import Evict
from assay.runtime.attention import Step


@dataclass(frozen=True)
class H2O(Evict):
    """Keeps the latest tokens and those with the largest sum of attention so far."""

    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (2023)"
    statistics: ClassVar[int] = 1
    recent_share: float = 0.5

    def observe(self, step: Step, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add the attention of the new queries."""
        return (past[0].add_(step.column_sums()),)

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """The sum."""
        return past[0]

    def recent(self, capacity: int) -> int:
        """A share of the budget."""
        return int(capacity * self.recent_share)


METHOD = H2O
