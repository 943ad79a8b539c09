"""Rounding by ADMM: a free copy of the weights and a rounded one, tied ever tighter.

The free copy minimises f plus rho/2 times its squared distance to the rounded one, exactly, in the eigenbases of G
and H; the rounded one is the nearest on the grid; a running sum of their differences pushes both together.
(Takapoui et al., A Simple Effective Heuristic for Embedded Mixed-Integer Quadratic Programming, 2015; Leng et al.,
Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM, 2017.) The free copy sees all weights
at once, where error feedback commits to one after another.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid.base import Grid
from assay.methods.solve import clip
from assay.methods.solve.curvature import diagonal, total
from assay.methods.solve.learned import Start, begin, finish, pose
from assay.methods.solve.refine import Problem, Rounding
from assay.methods.solve.rounded import Rounded
from assay.methods.solve.sandwich import sandwich
from assay.model.threads import started

STEPS, LOOSE, TIGHT = 32, 0.13, 0.6
"""See `solve`; as good on `pebble` as 40 from 0.06 to 1."""


class Basis(NamedTuple):
    """Of symmetric matrices [batch, n, n]."""

    values: Tensor
    """[batch, n], none negative"""
    vectors: Tensor
    """[batch, n, n], in columns"""


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    start: Start = "clip",
    steps: int = STEPS,
    loose: float = LOOSE,
    tight: float = TIGHT,
    polish: bool = True,
) -> Rounded:
    """Round `weight` [..., out, in]. Without H only `clip` is left; without G all rows weigh the same.

    start: the grid, and the codes at first. steps: each is four matrix products. loose, tight: rho at the start and
    the end, in units of the curvature along single weights. polish: finish with `refine.polish`. Never worse than the start.
    """
    if H is None:
        return clip.solve(weight, grid)
    problem = pose(weight, grid, H, G)
    first = begin(problem, start)
    return finish(problem, first, learn(problem, first, steps, loose, tight, G is not None), polish, weight.shape)


def learn(problem: Problem, start: Rounding, steps: int, loose: float, tight: float, coupled: bool = True) -> Rounding:
    """The best rounded copy of `steps`, on the grid of `start`; coupled: False if G is diagonal, and there is nothing to turn."""
    grid = problem.grid
    scale, low, high = grid.per_weight(start.affine, problem.weight.shape[-1])

    def snap(values: Tensor) -> tuple[Tensor, Tensor]:
        centred = grid.snap(values, scale, low, high)
        return centred, grid.level(centred, scale)

    levels = grid.level(start.centred, scale)
    found = bases(problem.inputs, problem.outputs if coupled else None)()
    best = iterate(problem.weight, problem.inputs, problem.outputs, found, (start.centred, levels), snap, steps, loose, tight)
    return Rounding(best, start.affine)


def iterate(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    found: Sequence[Basis],
    start: tuple[Tensor, Tensor],
    snap: Callable[[Tensor], tuple[Tensor, Tensor]],
    steps: int = STEPS,
    loose: float = LOOSE,
    tight: float = TIGHT,
) -> Tensor:
    """The best of `steps` rounded copies of weight [batch, out, in]; start, snap: the steps of a grid, and their levels.

    Weights are scaled by sqrt(G_ii H_jj), so that G and H have ones on their diagonals and rho ties every weight
    as tightly as its own cost asks. Scaling changes neither f nor what is nearest, only the way there. found: `bases` of the two.
    """
    loud = diagonal(outputs).sqrt()[..., None] * diagonal(inputs).sqrt()[..., None, :]
    (columns, right), *others = found
    rows, left = others[0] if others else (torch.ones_like(outputs[..., 0]), None)
    curvature = rows[..., None] * columns[..., None, :]

    # Only differences are turned, so bf16 is precise enough: it adds 0.2% to 0.5% of damage, 6% to 24% if weights are turned.
    size = weight.shape[1]
    turned = sandwich(None if left is None else left.mT, right, size)
    restored = sandwich(left, right.mT, size)

    # In the eigenbases: how far the rounded copy is from the weight (away), and the free one (back).
    target, best = weight * loud, start[0]
    away = turned(target - start[1] * loud)
    lowest = torch.full_like(away[:, :1, :1], torch.inf)
    push, turned_push = torch.zeros_like(away), torch.zeros_like(away)
    growth = (tight / loose) ** (1 / max(1, steps - 1))
    for step in range(steps):
        rho = loose * growth**step
        back = (away + turned_push).mul_((curvature + rho).reciprocal_().mul_(rho))
        wanted = restored(back).neg_().add_(target).add_(push)
        centred, levels = snap(wanted / loud)
        levels = levels.mul_(loud)
        away = turned(target - levels)
        # Both sums hold forces divided by rho, so they shrink as rho grows.
        push, turned_push = wanted.sub_(levels).div_(growth), turned_push.sub_(back).add_(away).div_(growth)
        value = total(away.square().mul_(curvature))[:, None, None]
        best, lowest = torch.where(value < lowest, centred, best), value.minimum(lowest)
    return best


def bases(inputs: Tensor, outputs: Tensor | None) -> Callable[[], list[Basis]]:
    """Start on the eigenvectors of H, and of G where outputs depend on each other; returns what waits for them.

    Both are scaled to ones on the diagonal. A thread for each matrix: with several for one the last digits differ, and so do
    codes in the end.
    """
    moments = [m / (diagonal(m).sqrt()[..., None] * diagonal(m).sqrt()[..., None, :]) for m in (inputs, outputs) if m is not None]
    wait = started(torch.linalg.eigh, [matrix for moment in moments for matrix in moment])

    def found() -> list[Basis]:
        pairs = wait()
        each = [pairs[n : n + len(inputs)] for n in range(0, len(pairs), len(inputs))]
        return [Basis(torch.stack([a for a, _ in p]).clamp_(min=0), torch.stack([b for _, b in p])) for p in each]

    return found
