"""Value tables of number formats, and the formats of their scales, against their definitions."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from assay.methods.grid.scales import (
    ceil_e8m0,
    floor_e8m0,
    round_e8m0,
    round_nvfp4,
    split_e8m0,
    split_nvfp4,
    tensor_scale,
)
from assay.methods.grid.values import (
    BINARY,
    TERNARY,
    float_codes,
    float_values,
    power_law,
    power_of_two,
    quantile_values,
)

FP8 = {torch.float8_e4m3fn: (4, 3, {"nans": True}), torch.float8_e5m2: (5, 2, {"infinities": True})}


# ---- tables ------------------------------------------------------------------------------------


def test_small_floats() -> None:
    fp4 = float_values(2, 1)
    assert fp4 == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert float_values(3, 0)[7:] == (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    for (exponent, mantissa), (top, smallest) in {(3, 2): (28, 0.0625), (2, 3): (7.5, 0.125)}.items():
        values = float_values(exponent, mantissa)
        assert len(values) == 63 and max(values) == top and min(x for x in values if x > 0) == smallest


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_is_what_torch_stores(dtype: torch.dtype) -> None:
    exponent, mantissa, special = FP8[dtype]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = every[torch.isfinite(every)]
    values = float_values(exponent, mantissa, **special)
    assert list(values) == finite.unique().tolist()  # -0 and 0 are one level
    codes = torch.tensor(float_codes(exponent, mantissa, **special), dtype=torch.uint8)
    assert codes.view(dtype).float().tolist() == list(values)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_codes_of_floats_read_back_by_their_fields(bits: int) -> None:
    for exponent_bits in range(1, bits):
        mantissa_bits = bits - 1 - exponent_bits
        values, codes = float_values(exponent_bits, mantissa_bits), float_codes(exponent_bits, mantissa_bits)
        assert len(values) == len(codes) == 2**bits - 1
        for value, code in zip(values, codes, strict=True):
            exponent, mantissa = code >> mantissa_bits & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
            magnitude = (mantissa / 2**mantissa_bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 2 ** (exponent_bits - 1) + 1)
            assert value == magnitude * (-1 if code >> (bits - 1) else 1)


def test_the_bias_of_a_float_is_a_scale() -> None:
    for bias in (0, 2.5, -1):
        scaled = [x * 2.0 ** (1 - bias) for x in float_values(2, 1)]
        assert float_values(2, 1, bias) == pytest.approx(scaled, rel=1e-15)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_exponent_bit_is_uniform(bits: int) -> None:
    values = float_values(1, bits - 2)
    assert {b - a for a, b in pairwise(values)} == {values[-1] / (2 ** (bits - 1) - 1)}


def test_fp4_times_powers_of_two_casts_exactly_to_fp8() -> None:
    fp4 = torch.tensor(float_values(2, 1))
    for dtype, exponents in ((torch.float8_e4m3fn, range(-8, 7)), (torch.float8_e5m2, range(-15, 14))):
        exact = [k for k in range(-30, 30) if torch.equal((fp4 * 2.0**k).to(dtype).float(), fp4 * 2.0**k)]
        assert exact == list(exponents)


def test_four_bit_quantiles_are_nf4() -> None:
    # as published with QLoRA and stored by bitsandbytes
    nf4 = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert quantile_values(4) == pytest.approx(nf4, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantiles_share_probability_equally(bits: int) -> None:
    values = quantile_values(bits)
    assert len(values) == 2**bits and values[0] == -1 and values[-1] == 1
    zero = values.index(0.0)
    assert zero == 2 ** (bits - 1) - 1
    tail = (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    reach = -math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * tail - 1, dtype=torch.float64)))
    for side in (values[: zero + 1], values[zero:]):
        mass = [math.erf(x * reach / math.sqrt(2)) / 2 for x in side]
        assert [b - a for a, b in pairwise(mass)] == pytest.approx([(0.5 - tail) / (len(side) - 1)] * (len(side) - 1))


def test_shift_weights_have_no_zero() -> None:
    assert power_of_two(1) == BINARY and power_of_two(2) == (-2, -1, 1, 2)
    assert power_of_two(3) == (-8, -4, -2, -1, 1, 2, 4, 8)
    assert power_of_two(4)[8:] == tuple(2.0**s for s in range(8))


def test_power_law() -> None:
    for bits in (2, 3, 4, 8):
        top = 2 ** (bits - 1) - 1
        assert power_law(bits, 1) == tuple(range(-top, top + 1))
        assert power_law(bits, 0.5) == pytest.approx([k * abs(k) / top for k in range(-top, top + 1)])
    assert power_law(2, 0.3) == pytest.approx(TERNARY)


@pytest.mark.parametrize(
    "make",
    [lambda: float_values(0, 3), lambda: float_values(5, 3), lambda: quantile_values(5), lambda: power_of_two(7),
     lambda: power_law(4, 0), lambda: power_law(9, 1)],
)  # fmt: skip
def test_tables_that_do_not_exist_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="bits"):
        make()  # type: ignore[operator]


# ---- scales ------------------------------------------------------------------------------------

positive = st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=8)


@given(positive)
def test_powers_of_two(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    for top in (6.0, 7.5, 28.0, 448.0, 57344.0):
        expected = [2.0 ** (math.floor(math.log2(n)) - math.floor(math.log2(top))) for n in numbers]
        assert floor_e8m0(x, top, torch.float32).tolist() == expected
    above = ceil_e8m0(x, torch.float32)
    assert ((above >= x) & (above / 2 < x)).all()
    near = round_e8m0(x, torch.float32)
    assert ((x / near).log2().abs() <= 0.5 + 1e-5).all()
    for scale in (above, near):
        stored = split_e8m0(scale)
        assert torch.equal(stored, scale.to(torch.float8_e8m0fnu).view(torch.uint8))


def test_powers_of_two_stay_normal() -> None:
    extremes = torch.tensor([1e-38, 3e38])
    assert ceil_e8m0(extremes, torch.float16).tolist() == [2.0**-14, 2.0**15]
    with pytest.raises(ValueError, match="no powers of two"):
        split_e8m0(torch.tensor([1.5]))


@given(st.integers(0, 1000), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.floats(-8, 4))
@example(107, torch.bfloat16, 3.0)
def test_two_level_scales_split_exactly(seed: int, dtype: torch.dtype, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10**exponent * torch.rand(3, 8, 6, generator=generator).square()
    scale[0, 0] = 0
    whole = tensor_scale(scale.clamp(min=torch.finfo(dtype).tiny))
    rounded = round_nvfp4(scale, whole, dtype)
    assert rounded.dtype == dtype and (rounded > 0).all()
    stored = split_nvfp4(rounded)
    assert stored.parts.dtype == torch.float8_e4m3fn and stored.parts.shape == scale.shape
    assert stored.whole.dtype == torch.float32 and stored.whole.shape == (3,)
    assert torch.equal(stored.parts.float() * stored.whole[:, None, None], rounded.float())
    assert torch.equal(round_nvfp4(rounded.float(), tensor_scale(rounded), dtype), rounded)
    held = (scale >= whole * 2.0**-9) & (scale > torch.finfo(dtype).tiny)
    # three bits of mantissa: half a step is 1/16 of the number, and from 2^-6 down 2^-10
    assert ((rounded.float() - scale).abs() <= torch.maximum(scale / 16, whole * 2.0**-10))[held].all()


def test_scales_of_no_two_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="E4M3"):
        split_nvfp4(torch.tensor([[1.0, 1.01]]))
