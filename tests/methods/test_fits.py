"""Searches for the shape of a table and for scales: optimality, and the numbers their papers' cards name."""

import math

import pebble
import pytest
import torch
from torch import Tensor

from assay.methods.grid.fits import fit_bias, fit_power
from assay.methods.grid.scales import split_e8m0
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import float_values, power_law


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- power law ---------------------------------------------------------------------------------


def long_row() -> Tensor:
    """A Gaussian row with the largest of a million weights, 4.77 sigma."""
    row = normal(0, 1, 1 << 18).clamp(-4.77, 4.77)
    row[0, 0] = 4.77
    return row


def mean_error(weight: Tensor, exponent: float) -> float:
    grid = TableGrid(power_law(4, exponent), None, torch.float32)
    return float(grid.squared_errors(weight, grid.fit(weight)).mean())


def test_the_card_of_nupes() -> None:
    weight = long_row()
    for exponent, expected in ((0.5, 0.0259), (0.65, 0.0245), (1.0, 0.0387)):
        power = weight.sign() * weight.abs() ** exponent
        scale = power.abs().max() / 7
        code = (power / scale).round()
        in_powers = float((code.sign() * (scale * code.abs()) ** (1 / exponent) - weight).square().mean())
        assert in_powers == pytest.approx(expected, rel=0.02)
        # the card rounds the powers; the nearest level can only be better, and is the same on the uniform grid
        nearest = mean_error(weight, exponent)
        assert nearest <= in_powers * (1 + 1e-6)
        assert exponent != 1 or nearest == pytest.approx(in_powers, rel=1e-6)
    found = fit_power(weight, 4, None, torch.float32, clipped=False)
    assert 0.58 < found.parameter < 0.7
    assert found.error / weight.numel() <= min(mean_error(weight, i / 20) for i in range(4, 21)) * 1.001


def test_heavier_tails_move_the_exponent_down() -> None:
    uniform = torch.rand(1, 1 << 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    gauss = normal(2, 1, 1 << 16)
    laplace = gauss.sign() * -(torch.rand(1, 1 << 16, generator=torch.Generator().manual_seed(3)) + 1e-9).log()
    found = [fit_power(w, 4, None, torch.float32, clipped=False) for w in (uniform, gauss, laplace)]
    assert found[0].parameter > 0.9 > found[1].parameter + 0.2 > found[2].parameter + 0.3
    for fit, weight in zip(found, (uniform, gauss, laplace), strict=True):
        assert fit.error <= mean_error(weight, 1.0) * weight.numel() * (1 + 1e-6)


def test_exponent_one_is_the_uniform_grid() -> None:
    weight = normal(4, 16, 64)
    table = TableGrid(power_law(4, 1.0), 16)
    affine = table.fit(weight)
    centred = torch.clamp((weight.unflatten(-1, (4, 16)) / affine.scale.float()[..., None]).round(), -7, 7)
    assert torch.equal(
        table.decode(table.encode(weight, affine), affine), (centred * affine.scale[..., None]).bfloat16().flatten(-2)
    )


@pytest.mark.parametrize("importance", ["input", "weight"])
def test_importance_decides_the_exponent(importance: str) -> None:
    weight = normal(5, 64, 64)
    weight[:, ::2] = torch.rand(64, 32, generator=torch.Generator().manual_seed(6)) * 6 - 3
    costs = torch.zeros(64).index_fill_(0, torch.arange(0, 64, 2), 1.0)
    costs = costs if importance == "input" else costs.expand(64, 64).contiguous()
    on_uniform, on_gauss = (fit_power(weight, 4, None, torch.float32, c) for c in (costs, 1 - costs))
    assert on_uniform.parameter > on_gauss.parameter + 0.05


# ---- floats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("scale_format", ["dtype", "e8m0"])
def test_the_split_of_a_float_is_the_best_of_all(bits: int, scale_format: str) -> None:
    weight, importance = normal(7, 16, 64), normal(8, 64).square()
    found = fit_bias(weight, bits, 16, torch.bfloat16, scale_format, importance)
    for exponent_bits in range(1, bits):
        grid = TableGrid(float_values(exponent_bits, bits - 1 - exponent_bits), 16, torch.bfloat16, scale_format)
        other = (grid.squared_errors(weight, grid.fit_clipped(weight, importance)) * importance).double().sum()
        assert found.error <= float(other) * (1 + 1e-9)
        assert exponent_bits != found.parameter or found.error == pytest.approx(float(other))
    if scale_format == "e8m0":
        split_e8m0(found.affine.scale)


def test_the_split_follows_the_weights() -> None:
    signs = normal(9, 16, 256).sign()
    uniform = torch.rand(16, 256, generator=torch.Generator().manual_seed(10)) * signs
    wide = 2 ** (-6 * torch.rand(16, 256, generator=torch.Generator().manual_seed(11))) * signs
    assert fit_bias(uniform, 4, None).parameter == 1
    relative = 1 / wide.square()
    assert fit_bias(wide, 4, None, importance=relative).parameter == 3


def test_a_searched_split_beats_uniform_levels_and_e2m1_on_real_weights() -> None:
    """LLM-FP4 against its baselines, the fixed format and as many uniform levels, one scale per row."""
    total = dict.fromkeys(("searched", "e2m1", "uniform"), 0.0)
    for weight in list(pebble.weights().values())[::6]:
        total["searched"] += fit_bias(weight, 4, None).error
        for name, values in (("e2m1", float_values(2, 1)), ("uniform", power_law(4, 1.0))):
            grid = TableGrid(values, None)
            total[name] += float(grid.squared_errors(weight, grid.fit_clipped(weight)).double().sum())
    assert total["searched"] <= total["e2m1"] * (1 + 1e-9)
    assert total["searched"] < 0.95 * total["uniform"]


def test_a_real_bias_per_row_is_a_scale() -> None:
    """The closed form of the card: the bias that a clip value asks for, and the scale that stands for it."""
    weight = normal(12, 8, 64)
    grid = TableGrid(float_values(2, 1), None, torch.float32)
    clip = weight.abs().amax(-1)
    for row, c in enumerate(clip):
        bias = 2**2 - math.log2(float(c)) + math.log2(2 - 2**-1) - 1
        levels = torch.tensor(float_values(2, 1, bias))
        scale = grid.fit(weight).scale[row, 0]
        torch.testing.assert_close(levels, torch.tensor(grid.values) * scale)
