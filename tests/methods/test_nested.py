"""Double Rounding: every width is the top bits of one int8 tensor."""

import math

import pytest
import torch
from measured import damage

from assay.methods.base import Statistics, get
from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.nested import narrowed
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import PackedInteger


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_is_rounded_half_up_and_clipped(bits: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    affine = Affine(torch.full((1, 1), 0.37, dtype=torch.bfloat16), torch.full((1, 1), 128, dtype=torch.uint8))
    found, wide = narrowed(codes, affine, bits)
    middle, step = 2 ** (bits - 1), 2 ** (8 - bits)
    for code in range(256):
        rounded = math.floor((code - 128) / step + 0.5)
        assert int(found[0, code]) - middle == min(max(rounded, -middle), middle - 1)
    assert float(wide.scale) == float(affine.scale) * step


def test_low_widths_come_from_the_stored_bytes_alone() -> None:
    weight = normal(0, 2, 12, 64)
    master = get("nested")().encode(weight, Level.parse("int8-g32-sym"), torch.bfloat16, Statistics())
    for bits in range(2, 8):
        level = Level(bits, 32, True)
        for high, low in zip(master, get("nested")().encode(weight, level, torch.bfloat16, Statistics()), strict=True):
            assert isinstance(high, PackedInteger) and isinstance(low, PackedInteger)
            codes, affine = narrowed(high.codes, Affine(high.scale, high.zero_point), bits)
            again = PackedInteger(level, codes, *affine)
            assert torch.equal(low.codes, codes) and torch.equal(low.decode(), again.decode())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_code_is_at_most_one_from_direct_rounding_and_far_better_than_cutting(bits: int) -> None:
    weight, shift = normal(1, 64, 256), 8 - bits
    grid = IntegerGrid(8, None, True, torch.float32)
    affine = grid.fit(weight)
    codes = grid.encode(weight, affine)
    twice, wide = narrowed(codes, affine, bits)
    middle = 2 ** (bits - 1)
    direct = (weight / wide.scale).round().clamp(-middle, middle - 1) + middle
    assert int((twice.float() - direct).abs().max()) <= 1
    assert float((twice.float() != direct).float().mean()) < 0.1 * bits
    cut = ((codes.int() - 128) >> shift).float() * wide.scale
    rounded = (twice.float() - middle) * wide.scale
    ratio = (weight - cut).square().sum() / (weight - rounded).square().sum()
    assert 2.2 < float(ratio) < 4.2


def test_zero_points_are_refused() -> None:
    with pytest.raises(InputError, match="int4-g64-sym"):
        get("nested")().encode(normal(2, 1, 4, 64), Level(4, 64, False), torch.bfloat16, Statistics())


def test_on_real_weights_nesting_costs_little_at_four_bits() -> None:
    assert damage("nested", "int4-g64-sym") < 1.1 * damage("nearest", "int4-g64-sym")
    losses = [damage("nested", f"int{b}-g64-sym") for b in range(2, 9)]
    assert losses == sorted(losses, reverse=True)
