"""Rotations are orthogonal, exact to invert, and make weights Gaussian."""

import pytest
import torch

from assay.model.rotation import rotate, rotate_both, signs, unrotate


@pytest.mark.parametrize("size", [1, 2, 12, 43, 64, 96, 256, 344])
def test_rotations_are_orthogonal(size: int) -> None:
    turn = rotate(torch.eye(size)).double()
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [64, 344])
def test_products_are_unchanged(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, size, generator=generator), torch.randn(7, size, generator=generator)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(unrotate(rotate(weight)), weight, atol=1e-6, rtol=1e-6)
    moment = x.T @ x
    torch.testing.assert_close(rotate_both(moment), rotate(x).T @ rotate(x), atol=1e-3, rtol=1e-4)


def test_an_outlier_is_spread_over_all_inputs() -> None:
    weight = torch.zeros(1, 344)
    weight[0, 5] = 1.0
    assert float(rotate(weight).abs().max()) < 4 / 344**0.5


def test_signs_are_balanced_and_depend_on_the_seed() -> None:
    first, second = signs(4096, 0).float(), signs(4096, 1).float()
    assert abs(float(first.mean())) < 0.06
    assert abs(float((first * second).mean())) < 0.06
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.06
