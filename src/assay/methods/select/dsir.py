"""Windows that resemble a target text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.select._ngrams import counts


@dataclass(frozen=True)
class DSIR:
    """Draw windows by how much likelier their n-grams are in the target than in the pool.

    prior: n-grams of the pool that are added to the target's counts, so that what a short target happens not to hold is
    not impossible in it; the paper adds next to nothing, as its targets are long.
    """

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("target",)
    paper: ClassVar[str] = "Data Selection for Language Models via Importance Resampling (2023)"

    buckets: int = 10_000
    prior: float = 1_000.0

    def select(self, pool: Tensor, target: Tensor | None, count: int, seed: int) -> Tensor:
        """See `Selector.select`. Importance resampling without replacement, by Gumbel noise."""
        assert target is not None, "needs says so"
        weights = self.log_weights(pool, target)
        uniform = torch.rand(len(pool), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return (weights + noise).topk(count).indices

    def log_weights(self, pool: Tensor, target: Tensor) -> Tensor:
        """Log of the target's probability of each window over the pool's, float64 [windows]."""
        found = counts(pool, self.buckets).double()
        raw = found.sum(0) / found.sum()
        wanted = counts(target, self.buckets).double().sum(0)
        likely = (wanted + self.prior * raw) / (wanted.sum() + self.prior)
        return found @ ((likely + 1e-8).log() - (raw + 1e-8).log())


METHOD = DSIR
