"""What policies that drop tokens share: budgets, their checks, and the answers that most of them give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.policy import Shape, Statistics

SHAPES = ("uniform", "pyramid", "prefix")


@dataclass(frozen=True)
class Evict:
    """Keeps `budget` of the prompt's tokens in each layer and head; see `assay.runtime.policy.Evictor` for the fields."""

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[int] = 0
    shared: ClassVar[bool] = False
    grows: ClassVar[bool] = False

    budget: float = 0.5
    tokens: int | None = None
    sinks: int = 0
    shape: Shape = "uniform"

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

    def recent(self, capacity: int) -> int:
        """None protected."""
        return 0

    def target(self, capacity: int, prefill: bool) -> int:
        """Down to the capacity."""
        return capacity


def hashed(a: Tensor, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), float32, each a function of its integer and the seed only."""
    x = (a.long() * 0x9E3779B1 + seed * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() + 0.5).div(1 << 32).float().clamp(1e-7, 1 - 1e-7)


def places(step: Step) -> Tensor:
    """Place of each slot's token in its own text, int [B, H or 1, S]: what doesn't change with padding."""
    return step.positions.long() - step.first[:, None, None]


def heads(step: Step) -> Tensor:
    """Numbers that tell key heads of all layers apart, int [1, H, 1]."""
    count = step.keys.shape[1]
    return (step.layer * 4096 + step.head + torch.arange(count, device=step.keys.device))[None, :, None]
