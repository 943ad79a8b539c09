"""Rounding for the whole price 1/2 tr(G D H D^T): feedback along inputs and outputs, then descent.

1. A grid searched per group, errors weighted by what feedback leaves of each input's cost.
2. Babai's nearest plane for the metric G x H (`wavefront`). A second candidate fits the grid anew to what
   the weights had become when they were rounded; per matrix the better one goes on.
3. Scales refitted by least squares, codes moved one at a time (`refine`); neither can raise the price.

Cost: the factorisations, and per pass a few products of sizes out x in x in and out x out x in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid.base import SHRINKS, Affine, Grid
from assay.methods.solve import clip
from assay.methods.solve.curvature import (
    DAMPING,
    JOINT_INPUT_SHRINKAGE,
    OUTPUT_SHRINKAGE,
    conditional_importance,
    damp,
    falling_order,
    inverse_factor,
    permute,
    shrink,
    take_columns,
    take_rows,
)
from assay.methods.solve.refine import Problem, Rounding, better, polish, rounded
from assay.methods.solve.rounded import Rounded, check, flatten_batch
from assay.methods.solve.wavefront import wavefront


class _Order(NamedTuple):
    """Order of visit of one axis, and the factor of the inverse curvature in that order."""

    visit: Tensor
    """[batch, n]"""
    back: Tensor
    """[batch, n], the inverse permutation"""
    factor: Tensor
    """[batch, n, n], upper"""


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    shrinks: Sequence[float] = SHRINKS,
    shrink_inputs: float = JOINT_INPUT_SHRINKAGE,
    shrink_outputs: float = OUTPUT_SHRINKAGE,
    damping: float = DAMPING,
    second_grid: bool | None = None,
    refits: int = 2,
    sweeps: int = 3,
    tile: int | None = None,
) -> Rounded:
    """Round `weight` [..., out, in]. Without H only `clip` is left; without G all rows weigh the same.

    shrinks: ranges tried by the grid search. shrink_inputs, shrink_outputs: how far H and G move
    towards their diagonals; damping: then added, as a fraction of the mean diagonal. second_grid: also
    try the grid fitted to compensated weights; None: at 2 bits only, where it gains 5%, above it gains nothing.
    refits: how often scales are refitted, each time
    followed by `sweeps` of descent. tile: side of the square tiles of the wave (speed only);
    None: 64 on a CPU, where tiles are compiled loops, 16 elsewhere.
    """
    if H is None:
        return clip.solve(weight, grid, shrinks=shrinks)
    check(weight, grid, H, G)
    flat = flatten_batch(weight)
    inputs = shrink(flatten_batch(H), shrink_inputs)
    outputs = _identity(flat) if G is None else shrink(flatten_batch(G), shrink_outputs)
    columns = _order(inputs, damping)
    rows = _order(outputs, damping)
    problem = Problem(flat, damp(inputs, damping), damp(outputs, damping), grid)
    del inputs, outputs
    tile = tile or (64 if flat.device.type == "cpu" else 16)
    second = grid.bits == 2 if second_grid is None else second_grid
    best = _feedback(problem, rows, columns, shrinks, second, tile)
    best = polish(problem, best, refits, sweeps)
    return rounded(problem, best, weight.shape)


def _identity(weight: Tensor) -> Tensor:
    """No idea about the outputs: all alike and independent, [batch, out, out]."""
    eye = torch.eye(weight.shape[1], dtype=torch.float32, device=weight.device)
    return eye.expand(len(weight), -1, -1)


def _order(moment: Tensor, damping: float) -> _Order:
    """Largest diagonal first: what is loud is rounded while many others can still make up for it."""
    visit = falling_order(moment)
    return _Order(visit, visit.argsort(-1), inverse_factor(permute(moment, visit), damping)[0])


def _feedback(
    problem: Problem, rows: _Order, columns: _Order, shrinks: Sequence[float], second_grid: bool, tile: int
) -> Rounding:
    """The better of one or two passes of two-sided error feedback."""
    importance = conditional_importance(columns.factor, columns.visit)
    affine = problem.grid.fit_clipped(problem.weight, importance, shrinks)
    first, targets = _pass(problem, rows, columns, affine, tile)
    if not second_grid:
        return first
    affine = problem.grid.fit_clipped(targets, importance, shrinks)
    return better(problem, first, _pass(problem, rows, columns, affine, tile)[0])


def _pass(problem: Problem, rows: _Order, columns: _Order, affine: Affine, tile: int) -> tuple[Rounding, Tensor]:
    """One wave over the matrix; also what each weight had become when it was rounded."""

    def ordered(matrix: Tensor) -> Tensor:
        return take_rows(take_columns(matrix, columns.visit), rows.visit)

    def restored(matrix: Tensor) -> Tensor:
        return take_rows(take_columns(matrix, columns.back), rows.back)

    parameters = map(ordered, problem.grid.per_weight(affine, problem.weight.shape[-1]))
    wave = wavefront(ordered(problem.weight), columns.factor, rows.factor, problem.grid, parameters, tile)
    return Rounding(restored(wave.centred), affine), restored(wave.targets)
