"""Lloyd-Max tables: the published distortions, and the two conditions of an optimum."""

import pytest
import torch

from assay.methods.grid.lloyd_max import gaussian_distortion, lloyd_max
from assay.model.errors import InputError

PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Max (1960), Table I."""


@pytest.mark.parametrize("bits", PUBLISHED)
def test_distortion_is_the_published_one(bits: int) -> None:
    assert gaussian_distortion(lloyd_max(bits)) == pytest.approx(PUBLISHED[bits], rel=3e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_level_is_the_mean_of_its_cell(bits: int) -> None:
    levels = lloyd_max(bits)
    assert levels.dtype == torch.float64
    assert len(levels) == 1 << bits
    assert (levels.diff() > 0).all()
    assert torch.equal(levels.flip(0), -levels)
    # means by numbers, not by the formulas that found the levels
    x = torch.linspace(-9, 9, 1 << 20, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    mass, moment = (torch.zeros_like(levels).index_add_(0, cell, d) for d in (density, density * x))
    torch.testing.assert_close(moment / mass, levels, rtol=0, atol=2e-5)
    error = float((density * (x - levels[cell]).square()).sum() / density.sum())
    assert gaussian_distortion(levels) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_moving_any_level_makes_it_worse(bits: int) -> None:
    levels = lloyd_max(bits)
    best = gaussian_distortion(levels)
    for i in range(len(levels)):
        for step in (-1e-3, 1e-3):
            moved = levels.clone()
            moved[i] += step
            assert gaussian_distortion(moved) > best


def test_bits_out_of_range_are_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(InputError, match="1 to 8 bits"):
            lloyd_max(bits)
