"""Rounding by ADMM: a free copy of the weights and a rounded one, tied ever tighter.

The free copy minimises f plus rho/2 times its squared distance to the rounded one, exactly, in the eigenbases of G
and H; the rounded one is the nearest on the grid; a running sum of their differences pushes both together.
(Takapoui et al., A Simple Effective Heuristic for Embedded Mixed-Integer Quadratic Programming, 2015; Leng et al.,
Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM, 2017.) The free copy sees all weights
at once, where error feedback commits to one after another.
"""

import torch
from torch import Tensor

from assay.methods.grid.base import Grid
from assay.methods.solve import clip
from assay.methods.solve.learned import Start, begin, finish, pose
from assay.methods.solve.refine import Problem, Rounding
from assay.methods.solve.rounded import Rounded


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    start: Start = "clip",
    steps: int = 60,
    loose: float = 0.1,
    tight: float = 10.0,
    polished: bool = True,
) -> Rounded:
    """Round `weight` [..., out, in]. Without H only `clip` is left; without G all rows weigh the same.

    start: whose grid and codes. loose, tight: rho at the start and the end, in units of the mean curvature.
    polished: finish with `refine.polish`. Never worse than the start. Each step is four matrix products.
    """
    if H is None:
        return clip.solve(weight, grid)
    problem = pose(weight, grid, H, G)
    first = begin(problem, start)
    return finish(problem, first, learn(problem, first, steps, loose, tight), polished, weight.shape)


def learn(problem: Problem, start: Rounding, steps: int, loose: float, tight: float) -> Rounding:
    """The best rounded copy of `steps`, on the grid of `start`."""
    grid = problem.grid
    scale, low, high = grid.per_weight(start.affine, problem.weight.shape[-1])
    (rows, left), (columns, right) = torch.linalg.eigh(problem.outputs), torch.linalg.eigh(problem.inputs)
    curvature = rows.clamp(min=0)[..., None] * columns.clamp(min=0)[..., None, :]
    unit = curvature.mean((1, 2), keepdim=True)

    def turned(matrix: Tensor) -> Tensor:
        return left.mT @ matrix @ right

    goal, best = turned(problem.weight), start.centred
    levels = grid.level(best, scale)
    rounded, push = turned(levels), torch.zeros_like(levels)
    turned_push, lowest = torch.zeros_like(levels), torch.full_like(unit, torch.inf)
    growth = (tight / loose) ** (1 / max(1, steps - 1))
    for step in range(steps):
        rho = unit * loose * growth**step
        free = (curvature * goal + rho * (rounded - turned_push)) / (curvature + rho)
        back = left @ free @ right.mT
        centred = grid.snap(back + push, scale, low, high)
        levels = grid.level(centred, scale)
        rounded = turned(levels)
        # The sums are of forces divided by rho, so they shrink as rho grows.
        push, turned_push = (push + back - levels) / growth, (turned_push + free - rounded) / growth
        value = (curvature * (goal - rounded).square()).sum((1, 2), keepdim=True)
        best, lowest = torch.where(value < lowest, centred, best), value.minimum(lowest)
    return Rounding(best, start.affine)
