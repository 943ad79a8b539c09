"""Improve a finished rounding: move single codes, refit scales. Neither ever raises the objective.

The objective is f = 1/2 tr(G D H D^T), D = weight - decoded, with H and G as the solver used them
(shrunken and damped). Everything is batched: weight [batch, out, in], H [batch, in, in], G [batch, out, out].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid.integer import Affine, IntegerGrid
from assay.methods.solve.curvature import damage, diagonal


class Problem(NamedTuple):
    """One rounding problem per entry of the batch; float32."""

    weight: Tensor
    """[batch, out, in]"""
    inputs: Tensor
    """H [batch, in, in], symmetric positive definite"""
    outputs: Tensor
    """G [batch, out, out], symmetric positive definite"""
    grid: IntegerGrid


def objective(problem: Problem, centred: Tensor, affine: Affine) -> Tensor:
    """f of each problem, [batch]; centred: codes counted from the zero point."""
    scale = problem.grid.per_weight(affine, centred.shape[-1])[0]
    return damage(problem.weight - problem.grid.level(centred, scale), problem.inputs, problem.outputs)


# ---- codes -----------------------------------------------------------------------------------


def descend(problem: Problem, centred: Tensor, affine: Affine, sweeps: int = 1, block: int = 32) -> Tensor:
    """Coordinate descent on the codes (as QuantEase 2023 and CDQuant 2024 for G = I); returns centred codes.

    A sweep visits the columns in order. In a column every weight is offered its own best level given
    all others, and a set of offers is accepted that cannot raise f even jointly (see `_accept`).
    The gradient G D H is kept exact: at once inside a block of columns, by one product per block beyond.
    """
    state = _Descent(problem, centred, affine)
    for _ in range(sweeps):
        state.sweep(block)
    return state.centred.mT.contiguous()


class _Descent:
    """Weights held transposed, [batch, in, out], so that a column is contiguous."""

    def __init__(self, problem: Problem, centred: Tensor, affine: Affine) -> None:
        self.problem = problem
        parameters = problem.grid.per_weight(affine, centred.shape[-1])
        self.scale, self.low, self.high = (p.mT.contiguous() for p in parameters)
        self.centred = centred.mT.contiguous().clone()
        self.levels = problem.grid.level(self.centred, self.scale)
        self.row_weight, self.column_weight = diagonal(problem.outputs), diagonal(problem.inputs)
        self.coupling = problem.outputs.abs()
        self.coupling.diagonal(dim1=1, dim2=2).zero_()

    def sweep(self, block: int) -> None:
        """Visit every column once."""
        inputs, outputs = self.problem.inputs, self.problem.outputs
        through = (self.problem.weight.mT - self.levels) @ outputs  # (G D)^T, afresh: no drift
        for start in range(0, self.levels.shape[1], block):
            columns = slice(start, min(start + block, self.levels.shape[1]))
            gradient = inputs[:, columns] @ through  # (G D H)^T of the block
            for k in range(gradient.shape[1]):
                j = start + k
                pushed = self._visit(j, gradient[:, k])
                through[:, j] -= pushed
                later = gradient[:, k + 1 :]
                later -= inputs[:, j, j + 1 : columns.stop, None] * pushed[:, None]

    def _visit(self, j: int, gradient: Tensor) -> Tensor:
        """Move column j where that helps; returns G times the step taken, [batch, out]."""
        grid, present, scale = self.problem.grid, self.levels[:, j], self.scale[:, j]
        curvature = self.row_weight * self.column_weight[:, j, None]
        codes = grid.snap(present + gradient / curvature, scale, self.low[:, j], self.high[:, j])
        levels = grid.level(codes, scale)
        step = levels - present
        change = (curvature * step / 2 - gradient) * step
        accepted = self._accept(step, change, self.column_weight[:, j, None])
        step = torch.where(accepted, step, 0.0)
        self.centred[:, j] = torch.where(accepted, codes, self.centred[:, j])
        self.levels[:, j] = torch.where(accepted, levels, present)
        return (self.problem.outputs @ step[..., None])[..., 0]

    def _accept(self, step: Tensor, change: Tensor, column_weight: Tensor) -> Tensor:
        """Which of the offered steps [batch, out] of one column to take.

        Steps a, b taken together change f by change_a + change_b + H_jj G_ab a b. Charging each step half
        of |H_jj G_ab a b| for every other offer bounds its share from above; all whose bound is
        negative may be taken together, and the best one alone always may.
        """
        size = step.abs()
        conflict = (self.coupling @ size[..., None])[..., 0]
        accepted = change + column_weight / 2 * size * conflict < 0
        best = change.argmin(-1, keepdim=True)
        return accepted.scatter_(-1, best, change.gather(-1, best) < 0)


# ---- scales ----------------------------------------------------------------------------------


def refit(problem: Problem, centred: Tensor, affine: Affine, iterations: int = 12) -> Affine:
    """The grid with its scales moved to the least-squares optimum for these codes.

    Rounded to the stored dtype and kept only for the matrices whose objective falls. Scales that would
    become negative, or fall below a third, stay: their codes carry no information about them.
    """
    free = least_squares_scales(problem, centred, affine.scale, iterations)
    present = affine.scale.float()
    scale = problem.grid.round_scale(torch.where(free > present / 3, free, present))
    trial = Affine(scale, affine.zero_point)
    better = objective(problem, centred, trial) < objective(problem, centred, affine)
    return Affine(torch.where(better[:, None, None], scale, affine.scale), affine.zero_point)


def least_squares_scales(problem: Problem, centred: Tensor, scale: Tensor, iterations: int) -> Tensor:
    """Scales [batch, out, groups], float32, that minimise f for fixed codes, by conjugate gradients.

    f is quadratic in the scales; their normal matrix has (out * groups)^2 entries and is never formed.
    Preconditioned by its diagonal; starts at `scale`, and every iteration lowers f (ignoring that
    decoded weights are rounded to the stored dtype).
    """
    codes = centred.unflatten(-1, (scale.shape[-1], -1))

    def weights(scales: Tensor) -> Tensor:
        return (codes * scales[..., None]).flatten(-2)

    def normal(scales: Tensor) -> Tensor:
        return gather(problem.outputs @ weights(scales) @ problem.inputs)

    def gather(gradient: Tensor) -> Tensor:
        return (gradient.unflatten(-1, codes.shape[-2:]) * codes).sum(-1)

    scales = scale.float()
    residual = gather(problem.outputs @ (problem.weight - weights(scales)) @ problem.inputs)
    preconditioner = _normal_diagonal(problem, codes)
    direction = torch.zeros_like(scales)
    previous = torch.ones_like(residual[:, :1, :1])
    for _ in range(iterations):
        scaled = residual / preconditioner
        power = (residual * scaled).sum((1, 2), keepdim=True)
        direction = scaled + direction * (power / previous)
        image = normal(direction)
        length = power / (direction * image).sum((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scales = scales + length * direction
        residual = residual - length * image
        previous = power.clamp(min=torch.finfo(torch.float32).tiny)
    return scales


def _normal_diagonal(problem: Problem, codes: Tensor) -> Tensor:
    """G_ii c_ig H_gg c_ig for every row i and group g, [batch, out, groups]; positive also for codes of 0."""
    groups, size = codes.shape[-2:]
    cells = problem.inputs.unflatten(1, (groups, size)).unflatten(3, (groups, size))
    blocks = cells.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [batch, groups, size, size]
    by_group = codes.transpose(1, 2)
    quadratic = ((by_group @ blocks) * by_group).sum(-1).transpose(1, 2) * diagonal(problem.outputs)[..., None]
    return quadratic.clamp(min=1e-6 * float(quadratic.mean()) + torch.finfo(torch.float32).tiny)
