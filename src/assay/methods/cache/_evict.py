"""What policies that drop tokens share: budgets, their checks, and the answers that most of them give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.policy import Shape, Statistics

SHAPES = ("uniform", "pyramid", "prefix", "planned")


@dataclass(frozen=True)
class Evict:
    """Keeps `budget` of the prompt's tokens in each layer and head; see `assay.runtime.policy.Evictor` for the fields."""

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[int] = 0
    shared: ClassVar[bool] = False

    budget: float = 0.5
    tokens: int | None = None
    sinks: int = 0
    shape: Shape = "uniform"
    grows: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise InputError(f"a budget of {self.budget:g}; give a share of the tokens above 0 and up to 1")
        if self.sinks < 0:
            raise InputError(f"{self.sinks} sinks; give 0 or more")
        if self.tokens is not None and self.tokens <= self.sinks:
            raise InputError(f"{self.tokens} tokens, no more than the {self.sinks} first that always stay; give more tokens")
        if isinstance(self.shape, str) and self.shape not in SHAPES:
            raise InputError(f"unknown shape {self.shape!r}; give {', '.join(SHAPES)} or a weight for each layer")

    def observe(self, step: Step, past: Statistics) -> Statistics:
        """Counts nothing."""
        return past

    def score(self, step: Step, past: Statistics) -> Tensor:
        """Left to each policy."""
        raise NotImplementedError

    def recent(self, capacity: int) -> int:
        """None protected."""
        return 0

    def target(self, capacity: int, prefill: bool) -> int:
        """Down to the capacity."""
        return capacity


def hashed(*numbers: Tensor, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), float32, each a function of integers (of shapes that broadcast) and the seed only."""
    mixed = torch.tensor(seed, dtype=torch.int32, device=numbers[0].device)
    for i, x in enumerate(numbers):
        mixed = _mix(x.to(torch.int32) * 0x1E3779B1 + 0x5BD1E995 * (i + 1)) ^ mixed
    return (_mix(_mix(mixed)) & 0x7FFFFF).to(torch.float32).add_(0.5).div_(1 << 23)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 that spreads every bit over all; products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x2C1B3C6D
    x ^= (x >> 16) & 0xFFFF
    return x


def places(step: Step) -> Tensor:
    """Place of each slot's token in its own text, int [B, H or 1, S]: what doesn't change with padding."""
    return step.positions.long() - step.first[:, None, None]


def heads(step: Step) -> Tensor:
    """Numbers that tell key heads of all layers apart, int [1, H, 1]."""
    count = step.keys.shape[1]
    return (step.layer * 4096 + step.head + torch.arange(count, device=step.keys.device))[None, :, None]
