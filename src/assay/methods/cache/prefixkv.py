"""Unequal layers: each keeps the same share of its attention mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from assay.methods.cache._evict import Evict
from assay.runtime.attention import Step
from assay.runtime.policy import Shape


@dataclass(frozen=True)
class PrefixKV(Evict):
    """Mean attention of all queries and heads, with the budget shared over layers by one global threshold.

    The prompt of all layers is held until the last one has run. What is generated pushes out the token `distance` places
    from the end.
    """

    paper: ClassVar[str] = "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need (2024)"
    statistics: ClassVar[int] = 1
    shared: ClassVar[bool] = True
    sinks: int = 1
    shape: Shape = "prefix"
    distance: int = 25

    def observe(self, step: Step, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add the attention of the prompt."""
        return (past[0].add_(step.column_sums()),) if step.prefill else past

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """The sum over heads; once tokens are generated, how far they are from the place that is given up."""
        if step.prefill:
            return past[0].mean(1, keepdim=True)
        place = (step.positions[:, :1] - (step.queries.max() - self.distance)).abs()
        return place.float()

    def recent(self, capacity: int) -> int:
        """The last one."""
        return 1


METHOD = PrefixKV
