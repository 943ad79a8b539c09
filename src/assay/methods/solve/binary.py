"""Signs with a distance a group: on their own, as planes over coarser codes, and with 8-bit codes for salient weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve.ordered import Order


class Signs(NamedTuple):
    """A binary grid: mean + distance or mean - distance, [..., out, groups] each."""

    mean: Tensor
    distance: Tensor


def fit(weight: Tensor, keep: Tensor, groups: int) -> Signs:
    """The binary grid of the kept weights of each group: their mean, and the mean distance from it.

    weight, keep: [..., out, in]. Given the mean no other distance has a smaller squared error (XNOR-Net, 2016).
    A group of which none is kept has zeros.
    """
    values, member = weight.unflatten(-1, (groups, -1)), keep.unflatten(-1, (groups, -1))
    count = member.sum(-1).clamp_min(1)
    mean = (values * member).sum(-1) / count
    return Signs(mean, ((values - mean[..., None]).abs() * member).sum(-1) / count)


class Salient(NamedTuple):
    """Codes of `salient_and_signs`, [batch, out, in] each, and their grids."""

    signs: Tensor
    codes: Tensor
    grid: Signs
    affine: Affine


class _Mixed:
    """Column quantizer: 8-bit codes where a weight is salient, a sign where not."""

    def __init__(self, order: Order, salient: Tensor, signs: Signs, affine: Affine, grid: IntegerGrid) -> None:
        size = salient.shape[-1] // signs.mean.shape[-1]
        wide = [order.taken(p.float().repeat_interleave(size, -1)).mT.contiguous() for p in signs]
        self.mean, self.distance = wide
        self.salient, self.grid = order.taken(salient).mT.contiguous(), grid
        self.scale, self.low, self.high = (p[..., 0] for p in grid.centred(affine))
        self.plus, self.codes = torch.zeros_like(self.salient), torch.zeros_like(self.salient, dtype=torch.uint8)

    def __call__(self, column: int, values: Tensor) -> Tensor:
        centred = self.grid.snap(values, self.scale, self.low, self.high)
        plus = values >= self.mean[:, column]
        self.plus[:, column], self.codes[:, column] = plus, (centred - self.low).to(torch.uint8)
        distance = torch.where(plus, self.distance[:, column], -self.distance[:, column])
        return torch.where(self.salient[:, column], self.grid.level(centred, self.scale), self.mean[:, column] + distance)


def salient_and_signs(weight: Tensor, salient: Tensor, order: Order, group_size: int | None, dtype: torch.dtype) -> Salient:
    """PB-LLM's (2023) loop: each weight on the grid that its mask names, errors fed back through H.

    weight: [batch, out, in]; salient: bool, alike; dtype: of means, distances and scales. The binary grid is fitted to
    the weights that use it, the 8-bit one to the range of the whole row.
    """
    grid = IntegerGrid(8, None, False, dtype)
    fitted = fit(weight, ~salient, weight.shape[-1] // (group_size or weight.shape[-1]))
    signs, affine = Signs(fitted.mean.to(dtype), fitted.distance.to(dtype)), grid.fit(weight)
    quantizer = _Mixed(order, salient, signs, affine, grid)
    order.feed(weight, quantizer)
    return Salient(order.restored(quantizer.plus.mT), order.restored(quantizer.codes.mT), signs, affine)


class _Plane:
    """Column quantizer: what came before, one distance up or down."""

    def __init__(self, order: Order, before: Tensor, distance: Tensor) -> None:
        size = before.shape[-1] // distance.shape[-1]
        self.before = order.taken(before).mT.contiguous()
        self.distance = order.taken(distance.float().repeat_interleave(size, -1)).mT.contiguous()
        self.plus = torch.zeros_like(self.before, dtype=torch.bool)

    def __call__(self, column: int, values: Tensor) -> Tensor:
        before, distance = self.before[:, column], self.distance[:, column]
        plus = values >= before
        self.plus[:, column] = plus
        return torch.where(plus, before + distance, before - distance)


def plane(weight: Tensor, before: Tensor, order: Order, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The next plane of signs (D2MoE, 2025) over the decoded weight `before` [batch, out, in].

    Returns signs (bool, alike) and distances [batch, out, groups] in `dtype`: the mean of what is left, weighted by what
    an error costs under feedback.
    """
    left = (weight - before).abs().unflatten(-1, (groups, -1))
    price = order.importance.unflatten(-1, (groups, -1))[:, None]
    distance = ((left * price).sum(-1) / price.sum(-1)).to(dtype)
    quantizer = _Plane(order, before, distance)
    order.feed(weight, quantizer)
    return order.restored(quantizer.plus.mT), distance
