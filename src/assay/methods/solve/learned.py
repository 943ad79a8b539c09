"""What the solvers share that learn a rounding by steps on the whole price f = 1/2 tr(G D H D^T), D = weight - decoded.

Papers on learned rounding take the error of a layer's output on sampled activations. f is that error's
expectation, weighted by what the loss feels of it, so no activation is needed: -df/d(decoded) = G D H.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.methods.solve.curvature import DAMPING, JOINT_INPUT_SHRINKAGE, OUTPUT_SHRINKAGE, damp, diagonal, shrink
from assay.methods.solve.refine import LARGE, Problem, Rounding, better, polish, rounded
from assay.methods.solve.rounded import Rounded, check, flatten_batch
from assay.model.alike import alike
from assay.model.precision import bf16_products

Start = Literal["nearest", "clip"]
PIECE = 1 << 18
"""Weights whose arrays fit in a processor's cache together."""


def pose(
    weight: Tensor,
    grid: Grid,
    H: Tensor,
    G: Tensor | None,
    *,
    shrink_inputs: float = JOINT_INPUT_SHRINKAGE,
    shrink_outputs: float = OUTPUT_SHRINKAGE,
    damping: float = DAMPING,
) -> Problem:
    """The problem that `two_sided.solve` poses for `weight` [..., out, in]; ValueError for shapes that don't fit."""
    check(weight, grid, H, G)
    flat = flatten_batch(weight)
    inputs = damp(shrink(flatten_batch(H), shrink_inputs), damping)
    if G is None:
        eye = torch.eye(flat.shape[1], dtype=torch.float32, device=flat.device)
        return Problem(flat, inputs, eye.expand(len(flat), -1, -1), grid)
    return Problem(flat, inputs, damp(shrink(flatten_batch(G), shrink_outputs), damping), grid)


def begin(problem: Problem, start: Start) -> Rounding:
    """Where learning starts: rounding to nearest, on the min-max grid or on the one that `clip` searches."""
    weight, grid = problem.weight, problem.grid
    affine = grid.fit(weight) if start == "nearest" else grid.fit_clipped(weight, diagonal(problem.inputs))
    return Rounding(grid.snap(weight, *grid.per_weight(affine, weight.shape[-1])), affine)


def finish(problem: Problem, start: Rounding, learned: Rounding, polished: bool, shape: torch.Size) -> Rounded:
    """The learned rounding, or `start` where that is better, in the weight's shape [..., out, in]."""
    best = better(problem, start, learned)
    best = polish(problem, best) if polished else best
    return rounded(problem, best, shape)


def pull(problem: Problem, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(G D H, f) at decoded weights [batch, out, in]: minus the derivative of f, and f [batch]."""
    difference = problem.weight - levels
    with bf16_products(difference[0].numel() >= LARGE):  # a step needs its direction, and most of the time is these products
        gradient = problem.outputs @ difference @ problem.inputs
    return gradient, (gradient * difference).sum((1, 2)) / 2


def around(problem: Problem, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, lower, upper), each [batch, out, in]: the two steps whose levels enclose each weight.

    Beyond the end of the grid, its last two. On a negative scale `lower` is the greater step.
    """
    weight, grid = problem.weight, problem.grid
    scale, low, high = grid.per_weight(affine, weight.shape[-1])
    near = grid.snap(weight, scale, low, high)
    far = grid.beside(near, torch.where((weight - grid.level(near, scale)) * scale >= 0, 1.0, -1.0), low, high)
    below = near * scale < far * scale
    return scale, torch.where(below, near, far), torch.where(below, far, near)


def by_rows(function: Callable[..., None], *tensors: Tensor) -> None:
    """Call `function` with a few rows of tensors [batch, out, ...] at a time; what it writes into them stays.

    For steps that treat every row alone. Over whole large matrices each of their many small functions would go through memory.
    """
    first = tensors[0]
    step = max(1, PIECE // max(1, first[:, :1].numel()))
    with alike():
        for start in range(0, first.shape[1], step):
            function(*(t[:, start : start + step] for t in tensors))
