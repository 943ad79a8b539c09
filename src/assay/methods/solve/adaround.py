"""AdaRound (Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020) on the whole price.

Every weight learns a number h in 0 .. 1 between the two levels around it, a sigmoid stretched beyond both ends. A
penalty 1 - |2h - 1|^beta, added after a warm-up, drives h to the ends; beta falls from 20, where only an h near an
end feels it, to 2. Steps are Adam's.
"""

import torch
from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.methods.solve import clip
from assay.methods.solve.curvature import diagonal
from assay.methods.solve.learned import Start, around, begin, by_rows, finish, pose, pull
from assay.methods.solve.refine import Problem, Rounding
from assay.methods.solve.rounded import Rounded
from assay.model.alike import alike

LOW, HIGH = -0.1, 1.1
"""Ends of the stretched sigmoid."""
BETAS = 20.0, 2.0
MOMENTS = 0.9, 0.999


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    start: Start = "clip",
    steps: int = 500,
    rate: float = 0.1,
    penalty: float = 1.0,
    warm_up: float = 0.2,
    polish: bool = True,
) -> Rounded:
    """Round `weight` [..., out, in]. Without H only `clip` is left; without G all rows weigh the same.

    start: the grid. rate: Adam's learning rate; penalty: in units of what a step of the weight
    alone costs; warm_up: share of the steps before it counts. polish: finish with `refine.polish`; without it
    every code is one of the two around its weight, or the start's. Never worse than the start.
    """
    if H is None:
        return clip.solve(weight, grid)
    problem = pose(weight, grid, H, G)
    first = begin(problem, start)
    learned = learn(problem, first.affine, steps, rate, penalty, warm_up)
    return finish(problem, first, learned, polish, weight.shape)


def learn(problem: Problem, affine: Affine, steps: int, rate: float, penalty: float, warm_up: float) -> Rounding:
    """The nearer end of every h after `steps`."""
    scale, lower, upper = around(problem, affine)
    bottom, width = lower * scale, (upper - lower) * scale
    place = ((problem.weight - bottom) / width).clamp_(0.01, 0.99)
    with alike():
        free = torch.logit((place - LOW) / (HIGH - LOW))
    mean, square, levels = torch.zeros_like(free), torch.zeros_like(free), torch.empty_like(free)
    unit = _cost(problem, width)

    def between(free: Tensor, bottom: Tensor, width: Tensor, levels: Tensor) -> None:
        levels.copy_(bottom + (free.sigmoid() * (HIGH - LOW) + LOW).clamp_(0, 1) * width)

    def move(free: Tensor, mean: Tensor, square: Tensor, width: Tensor, unit: Tensor, gradient: Tensor) -> None:
        soft = free.sigmoid()
        stretched = soft * (HIGH - LOW) + LOW
        h = stretched.clamp(0, 1)
        slope = -gradient * width / unit
        if progress >= 0:
            beta = BETAS[0] + (BETAS[1] - BETAS[0]) * progress
            side = 2 * h - 1
            slope -= 2 * penalty * beta * side.sign() * side.abs().pow_(beta - 1)
        slope *= soft * (1 - soft) * (h == stretched)
        mean.lerp_(slope, 1 - MOMENTS[0])
        square.lerp_(slope.square_(), 1 - MOMENTS[1])
        length = (square / (1 - MOMENTS[1] ** (step + 1))).sqrt_().add_(1e-8)
        free -= rate / (1 - MOMENTS[0] ** (step + 1)) * mean / length

    for step in range(steps):
        by_rows(between, free, bottom, width, levels)
        progress = (step / steps - warm_up) / (1 - warm_up)
        by_rows(move, free, mean, square, width, unit, pull(problem, levels)[0])
    return Rounding(torch.where(free >= 0, upper, lower), affine)


def _cost(problem: Problem, width: Tensor) -> Tensor:
    """What a step of each weight alone costs, G_ii H_jj width_ij^2."""
    rows, columns = diagonal(problem.outputs)[..., None], diagonal(problem.inputs)[..., None, :]
    return (rows * columns * width.square()).clamp(min=torch.finfo(torch.float32).tiny)
