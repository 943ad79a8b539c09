"""The scale that fits its own codes best, found by turns: codes for the scale, then the scale for the codes.

EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs (2023) descends on the same error by gradient;
the point where its gradient is zero is s = Σ w k / Σ k², so no optimiser is needed.
"""

import torch
from torch import Tensor

from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve.rounded import Rounded, check


def solve(weight: Tensor, grid: IntegerGrid, H: Tensor | None = None, G: Tensor | None = None, *, turns: int = 50) -> Rounded:
    """Round `weight` [..., out, in] to nearest with scales at a minimum of the squared error; H and G are ignored.

    Starts from the min-max range. A group whose error did not fall in a turn (its scale is rounded to
    `scale_dtype` each time) keeps its best scale, and one whose decoded weights are further away than those of `nearest`
    (rounded once more, they may be) that of the min-max range.
    """
    check(weight, grid)
    affine = first = grid.fit(weight)
    best, least = first, _errors(grid, weight, first)
    for _ in range(turns):
        affine = Affine(refitted(grid, weight, affine), affine.zero_point)
        error = _errors(grid, weight, affine)
        better = error < least
        if not bool(better.any()):
            break
        best = Affine(torch.where(better, affine.scale, best.scale), best.zero_point)
        least = torch.where(better, error, least)
    closer = _decoded_errors(grid, weight, best) <= _decoded_errors(grid, weight, first)
    best = Affine(torch.where(closer, best.scale, first.scale), best.zero_point)
    return Rounded(grid.encode(weight, best), best)


def refitted(grid: IntegerGrid, weight: Tensor, affine: Affine) -> Tensor:
    """Σ w k / Σ k² of each group for the codes k of the present scales, [..., out, groups]; unchanged where all are 0."""
    grouped = (affine.scale.shape[-1], -1)
    steps = grid.encode(weight, affine).float().unflatten(-1, grouped) - affine.zero_point.float()[..., None]
    energy = steps.square().sum(-1)
    fitted = (steps * weight.float().unflatten(-1, grouped)).sum(-1) / energy.clamp_min(1)
    return grid.round_scale(torch.where(energy > 0, fitted, affine.scale.float()))


def _errors(grid: IntegerGrid, weight: Tensor, affine: Affine) -> Tensor:
    return grid.squared_errors(weight, affine).unflatten(-1, (affine.scale.shape[-1], -1)).sum(-1)


def _decoded_errors(grid: IntegerGrid, weight: Tensor, affine: Affine) -> Tensor:
    away = grid.decode(grid.encode(weight, affine), affine).float() - weight
    return away.square().unflatten(-1, (affine.scale.shape[-1], -1)).sum(-1)
