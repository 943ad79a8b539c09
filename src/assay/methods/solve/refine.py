"""Improve a finished rounding: move single codes, refit scales. Neither ever raises the objective.

The objective is f = 1/2 tr(G D H D^T), D = weight - decoded, with H and G as the solver used them
(shrunken and damped). Everything is batched: weight [batch, out, in], H [batch, in, in], G [batch, out, out].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import Affine, Grid
from assay.methods.solve.curvature import damage, diagonal, total
from assay.methods.solve.rounded import Rounded
from assay.methods.solve.sandwich import sandwich
from assay.model.threads import spread


class Problem(NamedTuple):
    """One rounding problem per entry of the batch; float32."""

    weight: Tensor
    """[batch, out, in]"""
    inputs: Tensor
    """H [batch, in, in], symmetric positive definite"""
    outputs: Tensor
    """G [batch, out, out], symmetric positive definite"""
    grid: Grid


class Rounding(NamedTuple):
    """A candidate: steps of the grid [batch, out, in], and the grid."""

    centred: Tensor
    affine: Affine


def objective(problem: Problem, centred: Tensor, affine: Affine) -> Tensor:
    """f of each problem, [batch]; centred: steps of the grid, the unscaled levels."""
    return damage(_errors(problem, centred, affine), problem.inputs, problem.outputs)


def _errors(problem: Problem, centred: Tensor, affine: Affine) -> Tensor:
    """D, [batch, out, in]."""
    return problem.weight - problem.grid.level(centred, problem.grid.per_weight(affine, centred.shape[-1])[0])


def better(problem: Problem, one: Rounding, other: Rounding) -> Rounding:
    """Matrix by matrix the candidate with the smaller objective, `one` if they are equal.

    With the errors A and B of the two, f(B) - f(A) = 1/2 tr((B - A)^T G (A + B) H): the products of one objective.
    """
    a, b = _errors(problem, *one), _errors(problem, *other)
    change = total(problem.outputs @ (a + b) @ problem.inputs * (b - a))
    return choose(change < 0, other, one)


def choose(wins: Tensor, one: Rounding, other: Rounding) -> Rounding:
    """`one` for the matrices where `wins` [batch], else `other`; not a copy where all are of one."""
    if bool(wins.all()) or not bool(wins.any()):
        return one if bool(wins[0]) else other
    wins = wins[:, None, None]
    affine = Affine(*(torch.where(wins, a, b) for a, b in zip(one.affine, other.affine, strict=True)))
    return Rounding(torch.where(wins, one.centred, other.centred), affine)


def rounded(problem: Problem, found: Rounding, shape: torch.Size) -> Rounded:
    """What a solver returns for a weight of `shape` [..., out, in]."""
    codes = problem.grid.codes(found.centred, problem.grid.per_weight(found.affine, shape[-1])[1])
    affine = Affine(*(p.reshape(*shape[:-1], -1) for p in found.affine))
    return Rounded(codes.reshape(shape), affine)


def polish(problem: Problem, start: Rounding, refits: int = 2, sweeps: int = 3) -> Rounding:
    """Scales and codes in turn: `refits` times `refit`, each followed by `sweeps` of `descend`."""
    centred, affine = start
    for _ in range(refits):
        affine = refit(problem, centred, affine)
        centred = descend(problem, centred, affine, sweeps)
    return Rounding(centred, affine)


# ---- codes -----------------------------------------------------------------------------------


def descend(problem: Problem, centred: Tensor, affine: Affine, sweeps: int = 1, width: int = 8, block: int = 64) -> Tensor:
    """Coordinate descent on the codes (as QuantEase 2023 and CDQuant 2024 for G = I); returns steps.

    A sweep visits the columns in order, `width` of them at a time. Every weight there is offered its
    own best level given all others, and a set of offers is taken that lowers f jointly (see `_choose`).
    The gradient G D H is kept exact: at once inside a block of columns, by one product per block beyond.
    """
    state = _Descent(problem, centred, affine)
    for _ in range(sweeps):
        state.sweep(width, block)
    return state.centred.mT.contiguous()


class _Descent:
    """Weights held transposed, [batch, in, out], so that columns are contiguous."""

    def __init__(self, problem: Problem, centred: Tensor, affine: Affine) -> None:
        self.problem = problem
        parameters = problem.grid.per_weight(affine, centred.shape[-1])
        self.scale, self.low, self.high = (p.mT.contiguous() for p in parameters)
        self.centred = centred.mT.contiguous().clone()
        self.levels = problem.grid.level(self.centred, self.scale)
        self.row_weight, self.column_weight = diagonal(problem.outputs), diagonal(problem.inputs)
        self.through = (problem.weight.mT - self.levels) @ problem.outputs
        """(G D)^T"""

    def sweep(self, width: int, block: int) -> None:
        """Visit every column once."""
        inputs, through = self.problem.inputs, self.through
        for start in range(0, self.levels.shape[1], block):
            stop = min(start + block, self.levels.shape[1])
            gradient = inputs[:, start:stop] @ through  # (G D H)^T of the block
            if compiled.runs_on(through):
                self._block_compiled(start, stop, through, gradient)
                continue
            for first in range(start, stop, width):
                last = min(first + width, stop)
                pushed = self._visit(slice(first, last), gradient[:, first - start : last - start])
                through[:, first:last] -= pushed
                if last < stop:
                    gradient[:, last - start :] -= inputs[:, last:stop, first:last] @ pushed

    def _block_compiled(self, start: int, stop: int, through: Tensor, gradient: Tensor) -> None:
        """A block of columns, one weight after another, by `compiled.descend_block`."""
        grid = self.problem.grid
        facts = (grid.fine, compiled.ROUNDING[grid.scale_dtype], grid.table, start, stop)
        state = (
            self.problem.inputs.contiguous(), self.problem.outputs.contiguous(), through, gradient,
            self.scale, self.low, self.high, self.centred, self.levels,
        )  # fmt: skip
        spread(compiled.descend_block, len(through), facts, state)

    def _visit(self, columns: slice, gradient: Tensor) -> Tensor:
        """Move some columns where that helps; returns G times the steps taken, [batch, columns, out]."""
        grid, present, scale = self.problem.grid, self.levels[:, columns], self.scale[:, columns]
        curvature = self.row_weight[:, None, :] * self.column_weight[:, columns, None]
        codes = grid.snap(present + gradient / curvature, scale, self.low[:, columns], self.high[:, columns])
        levels = grid.level(codes, scale)
        offers = levels - present
        steps, pushed = self._choose(offers, gradient, curvature, self.problem.inputs[:, columns, columns])
        taken = steps != 0
        self.centred[:, columns] = torch.where(taken, codes, self.centred[:, columns])
        self.levels[:, columns] = torch.where(taken, levels, present)
        return pushed

    def _choose(self, offers: Tensor, gradient: Tensor, curvature: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The offered steps to take, [batch, columns, out], and G times them.

        Each offer lowers f alone. Those that would not if all the others were taken are withdrawn, and
        the change the rest makes together is evaluated exactly. Where that is no gain (none
        may be left), only the best single offer of the matrix is taken.
        """
        outputs = self.problem.outputs
        alone = (curvature * offers / 2 - gradient) * offers
        with_all = alone + offers * (inputs @ (offers @ outputs) - curvature * offers)
        steps = torch.where(with_all < 0, offers, 0.0)
        pushed = steps @ outputs
        together = total((inputs @ pushed / 2 - gradient) * steps)
        if bool((together >= 0).any()):
            best = alone.flatten(1).argmin(1, keepdim=True)
            single = torch.zeros_like(alone).flatten(1).scatter_(1, best, offers.flatten(1).gather(1, best))
            steps = torch.where(together[:, None, None] >= 0, single.view_as(steps), steps)
            pushed = steps @ outputs
        return steps, pushed


# ---- scales ----------------------------------------------------------------------------------


def refit(problem: Problem, centred: Tensor, affine: Affine, iterations: int = 4) -> Affine:
    """The grid with its scales moved to the least-squares optimum for these codes.

    Rounded to the stored dtype and kept only for the matrices whose objective falls. Scales that would
    change sign, or fall below a third, stay: their codes carry no information about them.
    """
    free = least_squares_scales(problem, centred, affine.scale, iterations)
    present = affine.scale.float()
    scale = problem.grid.round_scale(torch.where(free / present > 1 / 3, free, present))
    trial = Rounding(centred, Affine(scale, affine.zero_point))
    return better(problem, Rounding(centred, affine), trial).affine


def row_scales(weight: Tensor, inputs: Tensor, outputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Scales [batch, out] of rows with fixed unscaled values [batch, out, in] that minimise tr(G D H D^T).

    The normal equations are small here: (G o (V H V^T)) s = diag(G W H V^T).
    """
    through = values @ inputs
    normal = outputs * (through @ values.mT)
    wanted = ((outputs @ weight) * through).sum(-1)
    fitted = torch.linalg.solve(normal.double(), wanted.double()).float()
    return torch.where(fitted > scale / 3, fitted, scale)


def least_squares_scales(problem: Problem, centred: Tensor, scale: Tensor, iterations: int) -> Tensor:
    """Scales [batch, out, groups], float32, that minimise f for fixed codes, by conjugate gradients.

    f is quadratic in the scales; their normal matrix has (out * groups)^2 entries and is never formed.
    Preconditioned by its diagonal; starts at `scale`, and every iteration lowers f (ignoring that
    decoded weights are rounded to the stored dtype).
    """
    codes = centred.unflatten(-1, (scale.shape[-1], -1))
    through = sandwich(problem.outputs, problem.inputs, centred.shape[1])

    def weights(scales: Tensor) -> Tensor:
        return (codes * scales[..., None]).flatten(-2)

    def normal(scales: Tensor) -> Tensor:
        return gather(through(weights(scales)))

    def gather(gradient: Tensor) -> Tensor:
        return (gradient.unflatten(-1, codes.shape[-2:]) * codes).sum(-1)

    scales = scale.float()
    residual = gather(through(problem.weight - weights(scales)))
    preconditioner = _normal_diagonal(problem, codes)
    direction = torch.zeros_like(scales)
    previous = torch.ones_like(residual[:, :1, :1])
    for _ in range(iterations):
        scaled = residual / preconditioner
        power = total(residual * scaled)[:, None, None]
        direction = scaled + direction * (power / previous)
        image = normal(direction)
        length = power / total(direction * image)[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
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
