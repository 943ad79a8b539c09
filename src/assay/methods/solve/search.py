"""Move several codes of a row at once: what coordinate descent cannot reach, found by enumeration.

After descent no single code can move, but sets of codes still can: an input may step up if a correlated
one steps down. In every row at once a seed is taken (the weight whose next best level costs least), with
it the weights that would welcome its step most, and all 2^size subsets of their steps are priced exactly.
A small neighbourhood of the closest vector problem, searched exhaustively; rows in parallel.
"""

import torch
from torch import Tensor

from assay.methods.grid.base import Affine
from assay.methods.solve.curvature import diagonal
from assay.methods.solve.refine import Problem


def search(problem: Problem, centred: Tensor, affine: Affine, rounds: int = 16, size: int = 8) -> Tensor:
    """Steps [batch, out, in] after `rounds` seeds per row, `size` weights each; f never rises."""
    state = _Search(problem, centred, affine, min(size, centred.shape[-1]))
    for _ in range(min(rounds, centred.shape[-1])):
        state.round()
    return state.centred


class _Search:
    """Codes, levels and gradient G D H, each [batch, out, in]."""

    def __init__(self, problem: Problem, centred: Tensor, affine: Affine, size: int) -> None:
        self.problem, self.size = problem, size
        self.scale, self.low, self.high = problem.grid.per_weight(affine, centred.shape[-1])
        self.centred, self.levels = centred.clone(), problem.grid.level(centred, self.scale)
        self.row_weight = diagonal(problem.outputs)[..., None]
        self.curvature = self.row_weight * diagonal(problem.inputs)[..., None, :]
        self.gradient = problem.outputs @ (problem.weight - self.levels) @ problem.inputs
        self.tried = torch.zeros_like(centred, dtype=torch.bool)
        members = torch.arange(2**size, device=centred.device)[:, None] >> torch.arange(size, device=centred.device) & 1
        self.subsets = members.float()
        self.first, self.second = torch.triu_indices(size, size, 1, device=centred.device)
        self.terms = torch.cat([self.subsets, self.subsets[:, self.first] * self.subsets[:, self.second]], 1).mT

    def round(self) -> None:
        """One seed in every row."""
        codes, steps = self._next_best()
        chosen = self._neighbourhood(steps)
        taken, change = self._best_subset(steps.gather(-1, chosen), chosen)
        moves = torch.zeros_like(steps).scatter_(-1, chosen, taken)
        self._apply(moves, change, codes)

    def _next_best(self) -> tuple[Tensor, Tensor]:
        """Each weight's best other code beside the present one, and the step in weight it means."""
        side = torch.where(self.gradient >= 0, 1.0, -1.0)
        side = side * self.scale.sign()
        codes = self.problem.grid.beside(self.centred, side, self.low, self.high)
        return codes, self.problem.grid.level(codes, self.scale) - self.levels

    def _neighbourhood(self, steps: Tensor) -> Tensor:
        """Indices [batch, out, size]: the cheapest seed not tried before, and its best partners."""
        alone = (self.curvature * steps / 2 - self.gradient) * steps
        seed = alone.masked_fill(self.tried, torch.inf).argmin(-1, keepdim=True)
        self.tried.scatter_(-1, seed, True)
        correlated = self.problem.inputs.gather(-2, seed.expand_as(steps))  # row `seed` of H, for every row
        together = alone + self.row_weight * correlated * steps.gather(-1, seed) * steps
        return together.scatter(-1, seed, -torch.inf).topk(self.size, dim=-1, largest=False, sorted=False).indices

    def _best_subset(self, steps: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The steps [batch, out, size] of the best subset (0 for the rest), and its change of f [batch, out]."""
        curvature, gradient = self.curvature.gather(-1, chosen), self.gradient.gather(-1, chosen)
        alone = (curvature * steps / 2 - gradient) * steps
        one, other = chosen[..., self.first], chosen[..., self.second]
        matrix = torch.arange(len(steps), device=steps.device)[:, None, None]
        pairs = self.problem.inputs[matrix, one, other] * self.row_weight
        pairs = pairs * steps[..., self.first] * steps[..., self.second]
        change, subset = (torch.cat([alone, pairs], -1) @ self.terms).min(-1)
        return steps * self.subsets[subset], change

    def _apply(self, moves: Tensor, change: Tensor, codes: Tensor) -> None:
        """Take the moves of the rows that still gain if all others move too; failing that, of the best row."""
        inputs, outputs = self.problem.inputs, self.problem.outputs
        through = moves @ inputs
        others = ((outputs @ through - self.row_weight * through) * moves).sum(-1)
        several = torch.where((change + others < 0)[..., None], moves, 0.0)
        pushed = outputs @ several @ inputs
        stuck = ((pushed / 2 - self.gradient) * several).sum((1, 2)) >= 0
        if bool(stuck.any()):
            best = torch.zeros_like(change).scatter_(-1, change.argmin(-1, keepdim=True), 1.0)[..., None]
            several = torch.where(stuck[:, None, None], moves * best, several)
            pushed = outputs @ several @ inputs
        self.gradient -= pushed
        taken = several != 0
        self.centred = torch.where(taken, codes, self.centred)
        self.levels = torch.where(taken, self.levels + several, self.levels)
