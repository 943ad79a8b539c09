"""Scalar quantizers with the least squared error on a Gaussian.

Source: Quantizing for Minimum Distortion (Max, 1960); Least Squares Quantization in PCM (Lloyd, 1982).
"""

from __future__ import annotations

from functools import cache
from math import pi, sqrt

import torch
from torch import Tensor

from assay.model.errors import InputError


def lloyd_max(bits: int) -> Tensor:
    """The 2^bits levels, rising, float64, for unit variance: each the mean of the numbers nearest to it.

    bits: 1 to 8; anything else raises InputError.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"a Lloyd-Max table has 1 to 8 bits, not {bits}")
    return _levels(bits).clone()


@cache
def _levels(bits: int) -> Tensor:
    """The fixed point of `levels = means of their cells`, by Newton's method: a plain iteration takes up to 4^bits steps.

    Only the positive half is solved; there is one solution (the Gaussian is log-concave). The start is the density
    of levels that is best for many (Panter and Dite, 1951): a Gaussian of variance 3.
    """
    half = 1 << (bits - 1)
    levels = sqrt(3) * torch.special.ndtri(0.5 + (torch.arange(half).double() + 0.5) / (2 * half))
    for _ in range(100):
        means, slopes = _cell_means(levels)
        step = torch.linalg.solve(torch.eye(half).double() - slopes, means - levels)
        levels = levels + step
        if step.abs().max() < 1e-14:
            break
    return torch.cat((-levels.flip(0), levels))


def _cell_means(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a Gaussian in the cell of each positive level [n], and its derivatives [n, n] by the levels."""
    middles = (levels[:-1] + levels[1:]) / 2
    edges = torch.cat((levels.new_zeros(1), middles, levels.new_full((1,), torch.inf)))
    low, high, density = edges[:-1], edges[1:], _density(edges)
    mass = _tail(low) - _tail(high)
    means = (density[:-1] - density[1:]) / mass
    by_low = density[:-1] * (means - low) / mass
    by_high = (density[1:] * (high - means) / mass)[:-1]
    inner = by_low[1:]
    slopes = torch.diag(inner, -1) + torch.diag(by_high, 1)
    slopes += torch.diag(torch.cat((by_low.new_zeros(1), inner))) + torch.diag(torch.cat((by_high, by_high.new_zeros(1))))
    return means, slopes / 2


def gaussian_distortion(levels: Tensor) -> float:
    """Exact mean squared error of a unit Gaussian rounded to the nearest of `levels` [n]."""
    levels = levels.double().sort().values
    edges = torch.cat((levels.new_full((1,), -torch.inf), (levels[:-1] + levels[1:]) / 2, levels.new_full((1,), torch.inf)))
    mass, moment = _tail(edges[:-1]) - _tail(edges[1:]), _density(edges[:-1]) - _density(edges[1:])
    return float(1 + (levels * (levels * mass - 2 * moment)).sum())


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / sqrt(2 * pi)


def _tail(x: Tensor) -> Tensor:
    """Probability above x."""
    return torch.special.erfc(x / sqrt(2)) / 2
