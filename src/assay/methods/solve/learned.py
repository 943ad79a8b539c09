"""What the solvers share that learn a rounding by steps on the whole price f = 1/2 tr(G D H D^T), D = weight - decoded.

Papers on learned rounding take the error of a layer's output on sampled activations. f is that error's
expectation, weighted by what the loss feels of it, so no activation is needed: -df/d(decoded) = G D H.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.methods.solve.curvature import DAMPING, JOINT_INPUT_SHRINKAGE, OUTPUT_SHRINKAGE, damp, diagonal, shrink, total
from assay.methods.solve.refine import Problem, Rounding, better, polish, rounded
from assay.methods.solve.rounded import Rounded, check, flatten_batch
from assay.methods.solve.sandwich import sandwich
from assay.model.threads import spread

Start = Literal["nearest", "clip"]
WORTH = 1 << 16
"""Weights from which threads are worth waking."""


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


def puller(problem: Problem) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Decoded weights [batch, out, in] to (G D H, f): minus the derivative of f, and f [batch]."""
    through = sandwich(problem.outputs, problem.inputs, problem.weight.shape[1])

    def pull(levels: Tensor) -> tuple[Tensor, Tensor]:
        difference = problem.weight - levels
        gradient = through(difference)
        return gradient, total(gradient * difference) / 2

    return pull


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


def spread_rows(kernel: Callable[..., None], shared: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> None:
    """Run a compiled loop that treats every row alone on tensors [batch, out, ...]; what it writes into them stays."""
    rows = [t.view(-1, t.shape[-1]) for t in tensors]
    spread(kernel, len(rows[0]), shared, tuple(rows), rows[0].numel() >= WORTH)
