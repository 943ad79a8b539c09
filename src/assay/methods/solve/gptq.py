"""GPTQ (Frantar et al., 2022): error feedback along the inputs, all rows at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import SHRINKS, Affine, Grid
from assay.methods.solve import clip
from assay.methods.solve.curvature import (
    DAMPING,
    INPUT_SHRINKAGE,
    conditional_importance,
    falling_order,
    inverse_factor,
    permute,
    shrink,
    take_columns,
)
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.rounded import Rounded, check, flatten_batch
from assay.model.threads import spread


class FixedGrid:
    """Column quantizer of a grid fitted beforehand ("static groups")."""

    def __init__(self, grid: Grid, affine: Affine, order: Tensor) -> None:
        """affine: [batch, out, groups]; order: the inputs in order of visit, [batch, in]."""
        parameters = (take_columns(p, order) for p in grid.per_weight(affine, order.shape[-1]))
        self.grid = grid
        self.scale, self.low, self.high = (p.mT.contiguous() for p in parameters)
        self.codes = torch.empty_like(self.scale, dtype=torch.uint8)

    def __call__(self, column: int, values: Tensor) -> Tensor:
        scale, low = self.scale[:, column], self.low[:, column]
        steps = self.grid.snap(values, scale, low, self.high[:, column])
        self.codes[:, column] = self.grid.codes(steps, low)
        return self.grid.level(steps, scale)


class Visit(NamedTuple):
    """What the loop needs, leading axes of the weight as one."""

    weight: Tensor
    """[batch, out, in], float32"""
    order: Tensor
    """[batch, in], the inputs in order of visit"""
    factor: Tensor
    """[batch, in, in], upper, in that order; see `inverse_factor`"""


def visit(weight: Tensor, H: Tensor, act_order: bool, shrinkage: float, damping: float) -> Visit:
    """Order and factor for `weight` [..., out, in]; parameters as in `solve`."""
    flat, moment = flatten_batch(weight), shrink(flatten_batch(H), shrinkage)
    order = falling_order(moment) if act_order else torch.arange(flat.shape[-1], device=flat.device).expand(len(flat), -1)
    return Visit(flat, order, inverse_factor(permute(moment, order), damping)[0])


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    act_order: bool = True,
    clipped: bool = True,
    shrinks: Sequence[float] = SHRINKS,
    shrinkage: float = INPUT_SHRINKAGE,
    damping: float = DAMPING,
    block: int = 32,
) -> Rounded:
    """Round `weight` [..., out, in] to keep tr(D H D^T) small; without H, `clip` is what is left of it.

    act_order: visit inputs by falling H_jj, so that the loudest have the most columns left to make
    up for them. Group grids are those of the unmoved weight, also without it, where the paper refits each to the
    compensated weights at its turn. clipped: search each group's range,
    weighted by what feedback leaves of each input's cost, instead of min-max. shrinkage: how far H moves towards its diagonal.
    damping: added to H, as a fraction of its mean diagonal. G is ignored.
    """
    if H is None:
        return clip.solve(weight, grid, shrinks=shrinks if clipped else (1.0,))
    check(weight, grid, H)
    flat, order, factor = visit(weight, H, act_order, shrinkage, damping)
    affine = grid.fit_clipped(flat, conditional_importance(factor, order), shrinks) if clipped else grid.fit(flat)
    codes = take_columns(_codes(take_columns(flat, order), factor, grid, affine, order, block), order.argsort(-1))
    shape = (*weight.shape[:-1], -1)
    scale, zero = affine.scale.reshape(shape), affine.zero_point.reshape(shape)
    return Rounded(codes.reshape(weight.shape), Affine(scale, zero))


def _codes(weight: Tensor, factor: Tensor, grid: Grid, affine: Affine, order: Tensor, block: int) -> Tensor:
    """Codes (uint8) of `weight` [batch, out, in], whose columns are in order of visit."""
    if compiled.runs_on(weight):
        return codes_compiled(weight, factor, grid, affine, order, block)
    quantizer = FixedGrid(grid, affine, order)
    column_feedback(weight, factor, quantizer, block)
    return quantizer.codes.mT


def codes_compiled(weight: Tensor, factor: Tensor, grid: Grid, affine: Affine, order: Tensor, block: int = 32) -> Tensor:
    """`column_feedback` with a `FixedGrid` by `compiled.feed_rows`: the codes, as `FixedGrid.codes` but [batch, out, in]."""
    columns, values = weight.shape[-1], weight.clone()
    scale, low, high = (take_columns(p, order) for p in grid.per_weight(affine, columns))
    codes = torch.empty_like(values, dtype=torch.uint8)
    for start in range(0, columns, block):
        here, rest = slice(start, start + block), slice(start + block, columns)
        cells = tuple(p[..., here].contiguous() for p in (values, scale, low, high))
        errors, steps = torch.empty_like(cells[0]), torch.empty_like(cells[0])
        for m in range(len(weight)):
            facts = (grid.fine, compiled.ROUNDING[grid.scale_dtype], grid.table, factor[m, here, here].contiguous().numpy())
            spread(compiled.feed_rows, weight.shape[1], facts, tuple(c[m] for c in (*cells, errors, steps)))
        codes[..., here] = grid.codes(steps, cells[2])
        for m in range(len(weight)):
            values[m, :, rest].addmm_(errors[m], factor[m, here, rest], alpha=-1)
    return codes
