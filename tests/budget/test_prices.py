"""What a price says against what a method leaves, on real weights."""

from __future__ import annotations

import pytest
import torch
from measured import damage, pebble_block

from assay.budget.prices import price
from assay.methods.solve import trellis
from assay.methods.solve.trellis import feedback_gain, swelling
from assay.model.level import Level


@pytest.mark.parametrize("bits", [1.75, 2.25, 3, 4])
def test_the_price_of_a_trellis_is_what_it_leaves(bits: float) -> None:
    """It was 0.73, 0.85, 0.93 and 0.97 of that before it knew that feedback has errors encoded again."""
    level = Level.parse(f"trellis{bits:g}-channel")
    told = sum(price(w, c, [level])[level.name]["two_sided"] for w, c in pebble_block().values())
    assert told == pytest.approx(damage("trellis", level.name), rel=0.2)


def test_a_scale_that_expects_errors_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    with_room = damage("trellis", "trellis1.5-channel")
    monkeypatch.setattr(trellis, "SWELLING", 0.0)
    assert with_room < 0.95 * damage("trellis", "trellis1.5-channel")


def test_nothing_swells_without_feedback() -> None:
    gain = feedback_gain(torch.diag(torch.rand(7) + 0.1)[None])
    torch.testing.assert_close(gain, torch.ones(1))
    torch.testing.assert_close(swelling(1.5, gain), torch.ones(1))


def test_the_gain_is_the_mean_energy_of_errors_that_were_spread() -> None:
    factor = (torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * 0.3).triu(1) + torch.eye(16) * 2
    errors = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    spread = (errors / factor.diagonal()) @ factor
    assert float(feedback_gain(factor)) == pytest.approx(float(spread.square().mean()), rel=0.02)
