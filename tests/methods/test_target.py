"""Targets that make up for inputs that changed: least squares, and never for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.methods.solve.target import compensated


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """weight [8, 12], the original's inputs x and the changed ones y, [400, 12], float64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64) @ mix
    y = 0.9 * x + 0.5 * torch.randn(400, 12, generator=generator, dtype=torch.float64)
    return torch.randn(8, 12, generator=generator, dtype=torch.float64), x, y


def moved(strength: float, damping: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, x, y = inputs()
    return compensated(weight, y.mT @ y / 400, (x - y).mT @ y / 400, strength, damping), weight, x, y


def loss(target: Tensor, weight: Tensor, x: Tensor, y: Tensor) -> float:
    return float((x @ weight.mT - y @ target.mT).square().sum())


def test_at_full_strength_the_target_is_least_squares() -> None:
    target, weight, x, y = moved(1.0)
    torch.testing.assert_close(target.mT, torch.linalg.lstsq(y, x @ weight.mT).solution)


def test_every_share_of_the_way_lowers_the_error_and_the_opposite_way_raises_it() -> None:
    losses = {strength: loss(*moved(strength)) for strength in (-0.5, 0.0, 0.25, 0.5, 1.0)}
    assert losses[1.0] < losses[0.5] < losses[0.25] < losses[0.0] < losses[-0.5]


def test_damping_holds_the_target_near_the_weight() -> None:
    free, weight, *_ = moved(1.0)
    held, *_ = moved(1.0, damping=1.0)
    assert (held - weight).norm() < 0.9 * (free - weight).norm()


def test_inputs_that_did_not_change_leave_the_weight_as_it_is() -> None:
    weight, _, y = inputs()
    assert torch.equal(compensated(weight, y.mT @ y / 400, torch.zeros(12, 12, dtype=torch.float64)), weight)
