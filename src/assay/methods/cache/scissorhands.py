"""Persistence of importance: tokens that stay below the average attention go, rarely and in bulk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.methods.cache._evict import Evict
from assay.runtime.attention import Step, group_reduce


@dataclass(frozen=True)
class Scissorhands(Evict):
    """Drops the share `drop` of the budget at once: tokens most often below 1 / (visible keys).

    Counts start anew at each drop and are shares of the queries that could see the token; a prompt counts its last
    `history` queries.
    """

    paper: ClassVar[str] = "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression (2023)"
    statistics: ClassVar[int] = 2
    drop: float = 0.4
    history: int = 400
    latest: int = 10

    def observe(self, step: Step, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """How often each token was below average, and how often it could be seen."""
        below, exposed = past
        if step.attention is not None and step.attention.device.type == "cpu" and step.attention.dtype == torch.float32:
            _count(step.attention.detach().numpy(), below.detach().numpy(), exposed.detach().numpy())
            return past
        for _, attention in step.rows(self.history):
            seen = attention > 0
            low = attention * seen.sum(-1, keepdim=True) < 1
            below = below + group_reduce((low & seen).float().sum(3))
            exposed = exposed + group_reduce(seen.float().sum(3))
        return below, exposed

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """The share of its queries that found it above average; of equals, the later token."""
        age = (step.queries.max() - step.positions).clamp_min(0).float()
        return 1 - past[0] / past[1].clamp_min(1) - 1e-7 * torch.minimum(age, age.new_tensor(1e5))

    def recent(self, capacity: int) -> int:
        """A fixed number, at most half."""
        return min(self.latest, capacity // 2)

    def target(self, capacity: int, prefill: bool) -> int:
        """Room for the tokens to come."""
        return max(capacity - int(capacity * self.drop), min(capacity, self.sinks + 1))


@njit(nogil=True, cache=True)
def _count(attention: Any, below: Any, exposed: Any) -> None:
    """What `observe` adds for one query, float32 [B, H, g, 1, S]."""
    share = np.float32(1 / attention.shape[2])
    for b in range(attention.shape[0]):
        for h in range(attention.shape[1]):
            for j in range(attention.shape[2]):
                row, seen = attention[b, h, j, 0], 0
                for t in range(len(row)):
                    seen += np.int64(row[t] > 0)
                for t in range(len(row)):
                    if row[t] > 0:
                        exposed[b, h, t] += share
                        below[b, h, t] += share if row[t] * np.float32(seen) < 1 else np.float32(0)


METHOD = Scissorhands
