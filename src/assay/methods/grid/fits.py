"""Searches for the shape of a table, and for scales, by the weighted squared error of rounding to nearest."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid.base import Affine
from assay.methods.grid.scales import ScaleFormat
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import float_values, power_law

SAMPLE = 1 << 18
"""About how many weights a shape is judged by: enough for four digits of a mean squared error."""

EXPONENTS = tuple(i / 10 for i in range(2, 11))
GOLDEN = (5**0.5 - 1) / 2


class Fit(NamedTuple):
    """The best shape found for one matrix."""

    grid: TableGrid
    affine: Affine
    error: float
    """Weighted squared error of rounding the whole matrix to nearest."""
    parameter: float
    """The shape: exponent bits of a float, exponent of a power law."""


def fit_bias(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype = torch.bfloat16,
    scale_format: ScaleFormat = "dtype",
    importance: Tensor | None = None,
) -> Fit:
    """The best split of `bits` into exponent and mantissa, and biases, for `weight` [out, in] (LLM-FP4, 2023).

    All codes are finite numbers. A bias b is a scale of 2^-b: each group has its own, real with the scale format
    "dtype", an integer with "e8m0". importance: as in `Grid.fit_clipped`. The first of equal splits is taken, the one
    with the fewest exponent bits; with 1 the format is uniform, so never worse than that.
    """

    def shape(exponent_bits: int) -> TableGrid:
        return TableGrid(float_values(exponent_bits, bits - 1 - exponent_bits), group_size, scale_dtype, scale_format)

    if not 3 <= bits <= 8:
        raise ValueError(f"a float whose exponent bits are searched has 3 to 8 bits, not {bits}")
    fits = (_fit(weight, shape(e), importance, e) for e in range(1, bits))
    return min(fits, key=lambda fit: fit.error)


def fit_power(
    weight: Tensor,
    bits: int,
    group_size: int | None,
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
    clipped: bool = True,
    tolerance: float = 0.005,
) -> Fit:
    """The power law with the smallest error on `weight` [out, in], exponent in [0.2, 1] (NUPES, 2023).

    Nine exponents first, then a golden section around the best of them, on evenly spaced rows where the matrix is
    large. The result is never worse than exponent 1, the uniform grid. importance: as in `Grid.fit_clipped`.
    clipped: search each scale as well, for every exponent; else the plain fit, as in the paper.
    """
    stride = max(1, weight.numel() // SAMPLE)
    rows = weight[::stride]
    costs = importance if importance is None or importance.dim() < 2 else importance[::stride]

    def shape(exponent: float) -> TableGrid:
        return TableGrid(power_law(bits, exponent), group_size, scale_dtype)

    def error(exponent: float) -> float:
        return _fit(rows, shape(exponent), costs, exponent, clipped).error

    errors = {exponent: error(exponent) for exponent in EXPONENTS}
    place = EXPONENTS.index(min(errors, key=lambda exponent: errors[exponent]))
    low, high = EXPONENTS[max(place - 1, 0)], EXPONENTS[min(place + 1, len(EXPONENTS) - 1)]
    found = _golden_section(error, low, high, tolerance)
    shapes = dict.fromkeys((1.0, EXPONENTS[place], found))
    fits = [_fit(weight, shape(exponent), importance, exponent, clipped) for exponent in shapes]
    return min(fits, key=lambda fit: fit.error)


def _golden_section(error: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """A local minimum of `error` in [low, high], to within `tolerance`."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = error(left), error(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = error(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = error(right)
    return (low + high) / 2


def _fit(weight: Tensor, grid: TableGrid, importance: Tensor | None, parameter: float, clipped: bool = True) -> Fit:
    affine = grid.fit_clipped(weight, importance) if clipped else grid.fit(weight)
    errors = grid.squared_errors(weight, affine)
    if importance is not None:
        errors = errors * importance
    return Fit(grid, affine, float(errors.double().sum()), parameter)
