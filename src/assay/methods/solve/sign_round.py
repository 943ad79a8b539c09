"""Sign-gradient rounding (Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, 2023).

An offset of up to half a step is added to every weight before it is rounded to nearest, and the range of every
group shrinks at its top and its bottom. All of these move by the sign of their derivative, rounding counted as the
identity, at a rate that falls from 1/steps to 0. The best iterate by the true objective is kept.
"""

import numpy as np
import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import clip
from assay.methods.solve._learned_steps import move_offsets, round_offsets
from assay.methods.solve.learned import Start, around, begin, finish, pose, puller, spread_rows
from assay.methods.solve.refine import Problem, Rounding, choose
from assay.methods.solve.rounded import Rounded

SMALLEST = 0.5
"""How far a range may shrink."""


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    start: Start = "nearest",
    steps: int = 120,
    ranges: bool = True,
    polish: bool = True,
) -> Rounded:
    """Round `weight` [..., out, in]. Without H only `clip` is left; without G all rows weigh the same.

    start: the grid whose ranges shrink; ranges: whether they do; steps: as good as the usual 200, since no gradient here is
    a sample. polish: finish with `refine.polish`. Never worse than the start. Codes of a solver are no option: from there no
    step helped on `pebble`.
    """
    if H is None:
        return clip.solve(weight, grid)
    problem = pose(weight, grid, H, G)
    first = begin(problem, start)
    return finish(problem, first, learn(problem, first, steps, ranges), polish, weight.shape)


def learn(problem: Problem, start: Rounding, steps: int, ranges: bool) -> Rounding:
    """The best of `steps` + 1 roundings, `start` the first of them, on shrunken ranges of its grid."""
    weight, grid, base = problem.weight, problem.grid, start.affine
    _, lower, upper = around(problem, base)
    width = (upper - lower).abs()
    # What is learned: offsets in steps of the grid, -1/2 to 1/2; factors of the ranges above and below 0, or of the scale.
    offset, top, bottom = torch.zeros_like(weight), *(torch.ones_like(base.scale, dtype=torch.float32) for _ in range(2))
    pull = puller(problem)
    best, lowest = start, torch.full_like(top[:, 0, 0], torch.inf)
    for step in range(steps + 1):
        affine = shrunken(grid, base, top, bottom)
        present, levels = rounding(grid, weight, width, offset, affine)
        gradient, value = pull(levels)
        best, lowest = choose(value < lowest, present, best), value.minimum(lowest)
        if step == steps:
            break
        rate = (1 - step / steps) / steps
        found = move(grid, weight, width, offset, present, gradient, rate)
        for factor, slope in zip((top, bottom), found, strict=True) if ranges else ():
            factor.add_(rate * slope.sign()).clamp_(SMALLEST, 1)
    return best


def rounding(grid: Grid, weight: Tensor, width: Tensor, offset: Tensor, affine: Affine) -> tuple[Rounding, Tensor]:
    """Weights with their offsets rounded to nearest, and what that decodes to, [batch, out, in]."""
    if compiled.runs_on(weight):
        centred, levels = torch.empty_like(weight), torch.empty_like(weight)
        facts = (grid.fine, compiled.ROUNDING[grid.scale_dtype], grid.table)
        spread_rows(round_offsets, facts, (weight, width, offset, *grid.centred(affine), centred, levels))
        return Rounding(centred, affine), levels
    each, low, high = grid.per_weight(affine, weight.shape[-1])
    centred = grid.snap(weight + offset * width * each.abs(), each, low, high)
    return Rounding(centred, affine), grid.level(centred, each)


def move(
    grid: Grid, weight: Tensor, width: Tensor, offset: Tensor, present: Rounding, gradient: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """Move the offsets in place; returns `slopes`."""
    if compiled.runs_on(weight):
        scale, low, high = grid.centred(present.affine)
        up, down = torch.empty_like(scale), torch.empty_like(scale)
        state = (weight, width, offset, present.centred, gradient, scale, low, high, up, down)
        spread_rows(move_offsets, (np.float32(rate), _two_ends(grid)), state)
        return up, down
    wanted = weight + offset * width * grid.per_weight(present.affine, weight.shape[-1])[0].abs()
    offset.add_(rate * gradient.sign()).clamp_(-0.5, 0.5)
    return slopes(grid, weight, wanted, present, gradient)


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


def slopes(grid: Grid, weight: Tensor, wanted: Tensor, present: Rounding, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """-df/d(top), -df/d(bottom), up to positive factors, [batch, out, groups], with rounding counted as the identity.

    wanted: weight and offset; gradient: -df/d(decoded), which is up to a positive factor also that of the offset.
    Within the range a weight w decodes to w + (offset + what rounding added) * scale, so a larger scale moves it
    by its step minus w / scale; beyond the range it is the range's end.
    """
    scale, low, high = grid.per_weight(present.affine, weight.shape[-1])
    above, below = wanted / scale > high, wanted / scale < low
    outside = above | below
    along = gradient * (present.centred - weight / scale).masked_fill(outside, 0)

    def total(each: Tensor) -> Tensor:
        return each.unflatten(-1, (present.affine.scale.shape[-1], -1)).sum(-1)

    if not _two_ends(grid):
        top = total(along + gradient * present.centred * outside) * present.affine.scale.float().sign()
        return top, torch.zeros_like(top)
    inner = along / (high - low)
    return total(inner + gradient * above), total(inner - gradient * below)


def _two_ends(grid: Grid) -> bool:
    """Whether a zero point lets the ends of a range move apart."""
    return isinstance(grid, IntegerGrid) and not grid.symmetric
