"""A baseline: random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from assay.methods.cache._evict import Evict, hashed, heads, places
from assay.runtime.attention import Step


@dataclass(frozen=True)
class Random(Evict):
    """Keeps tokens by chance, other ones in each head; what other policies must beat."""

    paper: ClassVar[str] = "none (baseline)"
    grows: bool = True
    seed: int = 0

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """A number of the token's place, the head and the seed only."""
        return hashed(heads(step), places(step).clamp_min(0), seed=self.seed)


METHOD = Random
