"""Sign-gradient rounding (Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, 2023).

An offset of up to half a step is added to every weight before it is rounded to nearest, and the range of every
group shrinks at its top and its bottom. All of these move by the sign of their derivative, rounding counted as the
identity, at a rate that falls from 1/steps to 0. The best iterate by the true objective is kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import clip
from assay.methods.solve.learned import Start, around, begin, finish, pose, pull
from assay.methods.solve.refine import Problem, Rounding, choose
from assay.methods.solve.rounded import Rounded

SMALLEST = 0.5
"""How far a range may shrink."""


class Learned(NamedTuple):
    """What is learned; zeros and ones at the start. Ranges: [batch, out, groups]."""

    offset: Tensor
    """[batch, out, in], in steps of the grid, -1/2 .. 1/2"""
    top: Tensor
    """Factor of the range above 0; of the scale, on grids without zero points"""
    bottom: Tensor
    """Factor of the range below 0; unused on grids without zero points"""


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    start: Start = "nearest",
    steps: int = 200,
    ranges: bool = True,
    polished: bool = True,
) -> Rounded:
    """Round `weight` [..., out, in]. Without H only `clip` is left; without G all rows weigh the same.

    start: the grid, and from "gptq" and "two_sided" also the codes that offsets are measured from.
    ranges: whether ranges are learned. polished: finish with `refine.polish`. Never worse than the start.
    """
    if H is None:
        return clip.solve(weight, grid)
    problem = pose(weight, grid, H, G)
    first = begin(problem, start)
    target = problem.weight
    if start in ("gptq", "two_sided"):
        target = grid.level(first.centred, grid.per_weight(first.affine, weight.shape[-1])[0])
    return finish(problem, first, learn(problem, target, first.affine, steps, ranges), polished, weight.shape)


def learn(problem: Problem, target: Tensor, base: Affine, steps: int, ranges: bool) -> Rounding:
    """The best of `steps` + 1 roundings of `target` [batch, out, in]; the first is to nearest on `base`."""
    grid, columns = problem.grid, target.shape[-1]
    _, lower, upper = around(problem, base)
    width = (upper - lower).abs()
    ones = torch.ones_like(base.scale, dtype=torch.float32)
    now = Learned(torch.zeros_like(target), ones, ones)
    present = best = rounding(grid, target, width, base, now)
    lowest = torch.full_like(ones[:, 0, 0], torch.inf)
    for step in range(steps + 1):
        scale = grid.per_weight(present.affine, columns)[0]
        gradient, value = pull(problem, grid.level(present.centred, scale))
        best, lowest = choose(value < lowest, present, best), value.minimum(lowest)
        if step == steps:
            break
        rate = (1 - step / steps) / steps
        up = slopes(grid, target, present, gradient) if ranges else Learned(gradient, ones * 0, ones * 0)
        now = Learned(
            (now.offset + rate * up.offset.sign()).clamp_(-0.5, 0.5),
            (now.top + rate * up.top.sign()).clamp_(SMALLEST, 1),
            (now.bottom + rate * up.bottom.sign()).clamp_(SMALLEST, 1),
        )
        present = rounding(grid, target, width, base, now)
    return best


def rounding(grid: Grid, target: Tensor, width: Tensor, base: Affine, learned: Learned) -> Rounding:
    """`target` with its offsets rounded on the shrunken grid; width: of the step at each weight, [batch, out, in]."""
    affine = shrunken(grid, base, learned.top, learned.bottom)
    scale, low, high = grid.per_weight(affine, target.shape[-1])
    return Rounding(grid.snap(target + learned.offset * width * scale.abs(), scale, low, high), affine)


def shrunken(grid: Grid, base: Affine, top: Tensor, bottom: Tensor) -> Affine:
    """`base` with its range above 0 times `top` and below 0 times `bottom`; with ones it is `base`."""
    scale = base.scale.float()
    if not _two_ends(grid):
        return Affine(grid.round_scale(scale * top), base.zero_point)
    _, low, high = grid.centred(base)
    whole = high - low
    narrowed = grid.round_scale(scale * ((high * top - low * bottom) / whole))
    zero = (-low * bottom * scale / narrowed.float()).round().clamp(max=whole)
    return Affine(narrowed, zero.to(torch.uint8))


def slopes(grid: Grid, target: Tensor, present: Rounding, gradient: Tensor) -> Learned:
    """Minus the derivatives of f, up to positive factors, with every rounding counted as the identity.

    gradient: -df/d(decoded), [batch, out, in]. Within the range a decoded weight is target + (offset + what rounding
    added) * scale, so a larger scale moves it by its step minus target / scale; beyond, it is the end of the range.
    """
    scale, low, high = grid.per_weight(present.affine, target.shape[-1])
    wanted = target / scale
    above, below = (present.centred == high) & (wanted > high), (present.centred == low) & (wanted < low)
    outside = above | below
    along = gradient * (present.centred - wanted).masked_fill(outside, 0)

    def total(each: Tensor) -> Tensor:
        return each.unflatten(-1, (present.affine.scale.shape[-1], -1)).sum(-1)

    if not _two_ends(grid):
        top = total(along + gradient * present.centred * outside) * present.affine.scale.float().sign()
        return Learned(gradient, top, torch.zeros_like(top))
    inner = along / (high - low)
    return Learned(gradient, total(inner + gradient * above), total(inner - gradient * below))


def _two_ends(grid: Grid) -> bool:
    """Whether a zero point lets the ends of a range move apart."""
    return isinstance(grid, IntegerGrid) and not grid.symmetric
