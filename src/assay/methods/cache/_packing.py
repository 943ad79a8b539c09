"""What policies that store the cache smaller share: facts, checks, and maps of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.cache._channels import along, at_channels
from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.codecs import WIDTHS, Tensors

EVERY = 8
"""New tokens wait exact until so many have come: written one by one they would cost more time than they save memory."""


@dataclass(frozen=True)
class Packed:
    """Facts of a policy that quantizes."""

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[int] = 2


def check_bits(bits: int) -> None:
    """Raises InputError for widths that don't fill bytes."""
    if bits not in WIDTHS:
        raise InputError(f"{bits} bits; give {', '.join(map(str, WIDTHS))}")


def check_residual(residual: int, group: int) -> None:
    """Raises InputError unless whole groups fill the residual."""
    if group < 1 or residual < 1 or residual % group:
        raise InputError(f"a residual of {residual} tokens in groups of {group}; give a multiple of the group")


@dataclass(frozen=True)
class InHeads:
    """Facts of a map that treats each head alone and needs no positions."""

    positional: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    def backward(self, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """Left to each map."""
        raise NotImplementedError

    def dual(self, query: Tensor, shared: Tensors) -> Tensor:
        """Left to each map."""
        raise NotImplementedError

    def products(self, query: Tensor, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        return self.dual(query, shared) @ y.mT

    def summed(self, y: Tensor, shared: Tensors) -> Tensor:
        """See `Map`."""
        return self.backward(y, shared, y)


@dataclass(frozen=True)
class SortedChannels(InHeads):
    """Channels in the order of their size, so that those of a block are alike."""

    def fit(self, x: Tensor, step: Step) -> Tensors:
        """See `Map`."""
        return {"order": x.float().square().sum(2).argsort(dim=-1, descending=True, stable=True).to(torch.int16)}

    def forward(self, x: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        return x.gather(3, along(shared["order"], x))

    def backward(self, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        return torch.empty_like(y).scatter_(3, along(shared["order"], y), y)

    def dual(self, query: Tensor, shared: Tensors) -> Tensor:
        """See `Map`."""
        return at_channels(query, shared["order"])


@dataclass(frozen=True)
class KeptChannels(InHeads):
    """Some channels only: those of largest query norm times key norm, over the last `window` queries (ThinK, 2024)."""

    share: float
    window: int

    def fit(self, x: Tensor, step: Step) -> Tensors:
        """See `Map`."""
        heads, width = x.shape[1], x.shape[3]
        query = step.query[:, :, -self.window :] * (step.queries[:, -self.window :] >= 0)[:, None, :, None]
        asked = query.float().square().sum(2).unflatten(1, (heads, -1)).sum(2)
        score = asked * x.float().square().sum(2)
        count = max(int(self.share * width), 1)
        return {"channels": score.topk(count, -1)[1].sort(-1)[0].to(torch.int16), "width": x.new_empty(len(x), width, 0)}

    def forward(self, x: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        return x.gather(3, along(shared["channels"], x))

    def backward(self, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        whole = y.new_zeros(*y.shape[:3], shared["width"].shape[1])
        return whole.scatter_(3, along(shared["channels"], y), y)

    def dual(self, query: Tensor, shared: Tensors) -> Tensor:
        """See `Map`."""
        return at_channels(query, shared["channels"])


@dataclass(frozen=True)
class SmoothedPairs(InHeads):
    """Channels of a RoPE pair divided by the pair's largest norm, the `outliers` largest and their partners by their own.

    The norm of a pair doesn't change with RoPE, so this is the scale that could be folded before it (FireQ, 2025).
    """

    outliers: int

    def fit(self, x: Tensor, step: Step) -> Tensors:
        """See `Map`."""
        half = x.shape[3] // 2
        first, second = x.float().split([half, x.shape[3] - half], -1)
        pairs = (first.square() + second.square()).amax(2).sqrt()
        scale = torch.cat([pairs, pairs], -1)
        largest = x.float().abs().amax(2)
        top = largest.topk(min(self.outliers, x.shape[3]), -1)[1]
        own = torch.zeros_like(largest, dtype=torch.bool).scatter_(-1, top, True)
        own |= own.roll(half, -1)
        return {"scale": torch.where(own, largest, scale).clamp_min(1e-6).to(x.dtype)}

    def forward(self, x: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        return x / shared["scale"][:, :, None]

    def backward(self, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        return y * shared["scale"][:, :, None]

    def dual(self, query: Tensor, shared: Tensors) -> Tensor:
        """See `Map`."""
        return query * shared["scale"][:, :, None]
