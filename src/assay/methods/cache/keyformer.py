"""Key tokens by a noisy, tempered attention sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.cache._evict import Evict, hashed, heads
from assay.methods.cache._noise import gumbel, noisy_sums
from assay.runtime.attention import Step


@dataclass(frozen=True)
class Keyformer(Evict):
    """H2O's sum with Gumbel noise on the logits and a temperature that rises from 1 to 2 over `horizon` new tokens.

    The noise of a query and a key is a function of their places in the text, the head and the seed: it takes no random
    numbers from sampling and nothing from other rows.
    """

    paper: ClassVar[str] = "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference (2024)"
    statistics: ClassVar[int] = 1
    recent_share: float = 0.3
    noise: float = 1.0
    start: float = 1.0
    end: float = 2.0
    horizon: int = 256
    seed: int = 0

    def observe(self, step: Step, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add the noisy attention of the new queries."""
        temperature = self.start + (self.end - self.start) * min(step.decoded / self.horizon, 1)
        if self.noise and step.whole and step.found is not None and step.found.device.type == "cpu":
            return (past[0].add_(noisy_sums(step, self.noise, self.seed, temperature)),)
        return (past[0].add_(step.column_sums(None, temperature, self._gumbel if self.noise else None)),)

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """The sum."""
        return past[0]

    def recent(self, capacity: int) -> int:
        """A share of the budget."""
        return int(capacity * self.recent_share)

    def _gumbel(self, step: Step, rows: slice) -> Tensor:
        if step.positions.device.type == "cpu":
            return gumbel(step, rows, self.noise, self.seed)
        group = step.query.shape[1] // step.keys.shape[1]
        asked = (step.queries[:, rows] - step.first[:, None]).clamp_min(0)[:, None, None, :, None]
        slots = (step.positions - step.first[:, None, None]).clamp_min(0)[:, :, None, None, :]
        head = heads(step)[..., None, None] * 64 + torch.arange(group, device=step.keys.device)[None, None, :, None, None]
        return hashed(head, asked, slots, seed=self.seed).log_().neg_().log_().mul_(-self.noise)


METHOD = Keyformer
