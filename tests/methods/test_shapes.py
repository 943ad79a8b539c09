"""Methods that search the shape of their levels, and formats of two and three levels."""

from __future__ import annotations

import pytest
import torch
from measured import damage, encode, pebble_block
from torch import Tensor

from assay.methods.base import Statistics, get
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import float_values, power_law
from assay.model.level import Level
from assay.model.packed import PackedTable


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(method: str, level: str, weight: Tensor, **options: object) -> PackedTable:
    packed = get(method)(**options).encode(weight[None], Level.parse(level), torch.float32, Statistics())[0]
    assert isinstance(packed, PackedTable)
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors().values())
    return packed


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_nupes_stores_a_power_law_whose_exponent_is_below_one_on_gaussian_weights(bits: int) -> None:
    table = made("nupes", f"power{bits}-channel", normal(0, 16, 2048), clipped=False).table
    above = table[table > 0].unique().double()
    steps = torch.arange(1, len(above) + 1).double()
    slopes = (above[1:] / above[:-1]).log() / (steps[1:] / steps[:-1]).log()
    assert len(above) == 2 ** (bits - 1) - 1
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-4, atol=0)
    assert float(slopes[0]) > 1.1


def test_nupes_at_exponent_one_is_the_uniform_grid_and_never_worse() -> None:
    weights = [normal(1, 8, 256), torch.rand(8, 256, generator=torch.Generator().manual_seed(2)) - 0.5]
    weights += [weight for weight, _ in pebble_block().values()][:2]
    total = {"power": 0.0, "uniform": 0.0}
    for weight in weights:
        uniform = TableGrid(power_law(4, 1.0), 64, torch.float32)
        least = float(uniform.squared_errors(weight, uniform.fit_clipped(weight)).sum())
        found = float((made("nupes", "power4-g64", weight).decode() - weight).square().sum())
        assert found <= least * (1 + 1e-5)
        total = {"power": total["power"] + found / least, "uniform": total["uniform"] + 1}
    assert total["power"] < 0.97 * total["uniform"]


def test_llm_fp4_loses_no_more_under_its_own_measure_than_any_fixed_float() -> None:
    for weight, curvature in pebble_block().values():
        costs = curvature.h.diagonal()
        found = encode("llm_fp4", "fp4-channel", weight, curvature)
        error = float(((found.decode().float() - weight).square() * costs).sum())
        for exponent_bits in (1, 2, 3):
            grid = TableGrid(float_values(exponent_bits, 3 - exponent_bits), None)
            fixed = grid.decode(grid.encode(weight, affine := grid.fit_clipped(weight, costs)), affine).float()
            assert error <= float(((fixed - weight).square() * costs).sum()) * (1 + 1e-4)


@pytest.mark.parametrize("level", ["fp4-channel", "fp4-g64"])
def test_llm_fp4_beats_the_fixed_float_of_the_same_bits(level: str) -> None:
    assert damage("llm_fp4", level) < damage("nearest", level)


@pytest.mark.parametrize(("level", "values"), [("ternary2-g32", (-1, 0, 1)), ("binary1-g32", (-1, 1))])
@pytest.mark.parametrize("method", ["nearest", "clip", "gptq", "two_sided", "admm"])
def test_few_levels_are_these_and_no_others(method: str, level: str, values: tuple[int, ...]) -> None:
    weight, curvature = pebble_block()["model.layers.2.self_attn.q_proj.weight"]
    packed = encode(method, level, weight, curvature)
    assert isinstance(packed, PackedTable) and packed.scale is not None
    steps = packed.decode().float().unflatten(1, (-1, 32)) / packed.scale.float()[..., None]
    assert set(steps.round(decimals=5).unique().tolist()) == set(values)
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors().values())


def test_a_binary_scale_is_the_mean_magnitude() -> None:
    weight = normal(3, 8, 256)
    packed = made("clip", "binary1-g64", weight)
    assert packed.scale is not None
    torch.testing.assert_close(packed.scale, weight.unflatten(1, (4, 64)).abs().mean(-1), rtol=0.02, atol=0)


def test_more_levels_lose_less_and_feedback_pays_with_few_too() -> None:
    found = {level: damage("gptq", level) for level in ("binary1-g64", "ternary2-g64", "int2-g64-asym")}
    assert found["int2-g64-asym"] < found["ternary2-g64"] < 0.7 * found["binary1-g64"]
    assert found["ternary2-g64"] < 0.6 * damage("clip", "ternary2-g64")
