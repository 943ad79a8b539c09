"""AdaRound (Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020) on the whole price.

Every weight learns a number h in 0 .. 1 between the two levels around it, a sigmoid stretched beyond both ends. A
penalty 1 - |2h - 1|^beta, added after a warm-up, drives h to the ends; beta falls from 20, where only an h near an
end feels it, to 2. Steps are Adam's.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import Affine, Grid
from assay.methods.solve import clip
from assay.methods.solve._learned_steps import move_gates
from assay.methods.solve.curvature import diagonal
from assay.methods.solve.learned import Start, around, begin, finish, pose, spread_rows
from assay.methods.solve.refine import Problem, Rounding
from assay.methods.solve.rounded import Rounded
from assay.methods.solve.sandwich import sandwich
from assay.model.alike import alike

LOW, HIGH = -0.1, 1.1
"""Ends of the stretched sigmoid."""
BETAS = 20.0, 2.0
MOMENTS = 0.8, 0.8
"""Shorter memories than usual: this gradient has no noise to average away, and 160 steps then lose 1% beside 500."""


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    start: Start = "clip",
    steps: int = 160,
    rate: float = 0.3,
    penalty: float = 2.0,
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
    through, unit = sandwich(problem.outputs, problem.inputs, free.shape[1]), width / _cost(problem, width)
    state = State(free, torch.zeros_like(free), torch.zeros_like(free), bottom + place * width)
    for step in range(steps):
        progress = (step / steps - warm_up) / (1 - warm_up)
        beta = BETAS[0] + (BETAS[1] - BETAS[0]) * max(progress, 0.0)
        force = 2 * penalty * beta if progress >= 0 else 0.0
        lengths = rate / (1 - MOMENTS[0] ** (step + 1)), 1 / (1 - MOMENTS[1] ** (step + 1))
        move(state, through(problem.weight - state.levels).mul_(unit), bottom, width, lengths, beta, force)
    return Rounding(torch.where(state.free >= 0, upper, lower), affine)


class State(NamedTuple):
    """What a step changes in place, [batch, out, in] each."""

    free: Tensor
    """Before the sigmoid"""
    mean: Tensor
    square: Tensor
    levels: Tensor
    """Decoded weights"""


def move(
    state: State, gradient: Tensor, bottom: Tensor, width: Tensor, lengths: tuple[float, float], beta: float, force: float
) -> None:
    """A step of Adam down -`gradient`, in units of `_cost`, and the penalty.

    lengths: the rate and what squares count, both corrected for a short past.
    """
    if compiled.runs_on(gradient):
        pairs = ((np.float32(a), np.float32(b)) for a, b in ((LOW, HIGH), MOMENTS, lengths))
        spread_rows(move_gates, (*pairs, np.float32(beta), np.float32(force)), (gradient, bottom, width, *state))
        return
    soft = state.free.sigmoid()
    stretched = soft * (HIGH - LOW) + LOW
    h = stretched.clamp(0, 1)
    side = 2 * h - 1
    slope = (-gradient - force * side.sign() * side.abs().pow(beta - 1)) * soft * (1 - soft) * (h == stretched)
    state.mean.lerp_(slope, 1 - MOMENTS[0])
    state.square.lerp_(slope.square(), 1 - MOMENTS[1])
    state.free.sub_(lengths[0] * state.mean / (state.square * lengths[1]).sqrt().add(1e-8))
    state.levels.copy_(bottom + (state.free.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1) * width)


def _cost(problem: Problem, width: Tensor) -> Tensor:
    """What a step of each weight alone costs, G_ii H_jj width_ij^2."""
    rows, columns = diagonal(problem.outputs)[..., None], diagonal(problem.inputs)[..., None, :]
    return (rows * columns * width.square()).clamp(min=torch.finfo(torch.float32).tiny)
