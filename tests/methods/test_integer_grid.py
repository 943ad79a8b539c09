"""Integer grids: what is stored is what is decoded, and codes are nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.grid.base import Affine
from assay.methods.grid.formats import grid_of
from assay.methods.grid.integer import IntegerGrid
from assay.model.level import Level

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
grids = st.builds(
    IntegerGrid,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 1, 4, 8]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(DTYPES),
)


def random_weight(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10 ** torch.randn((*shape[:-1], 1), generator=generator)


@settings(max_examples=60)
@given(grids, st.integers(0, 1000))
def test_every_level_survives_encode_and_decode(grid: IntegerGrid, seed: int) -> None:
    fitted = grid.fit(random_weight(seed, 5, 16))
    codes = torch.arange(grid.top + 1)[:, None, None].expand(-1, 5, 16).to(torch.uint8)
    affine = Affine(*(p.expand(grid.top + 1, -1, -1) for p in fitted))
    levels = grid.decode(codes, affine)
    assert levels.dtype == grid.scale_dtype
    assert torch.equal(grid.decode(grid.encode(levels, affine), affine), levels)
    distinct = (levels[1:] != levels[:-1]).all()
    assert not distinct or torch.equal(grid.encode(levels, affine), codes)


@settings(max_examples=60)
@given(grids, st.integers(0, 1000))
def test_encoding_is_nearest(grid: IntegerGrid, seed: int) -> None:
    weight = random_weight(seed, 5, 16)
    affine = grid.fit(weight)
    every = torch.arange(grid.top + 1)[:, None, None].expand(-1, 5, 16).to(torch.uint8)
    levels = grid.decode(every, Affine(*(p.expand(grid.top + 1, -1, -1) for p in affine))).float()
    smallest = (levels - weight).abs().amin(0)
    mine = (grid.decode(grid.encode(weight, affine), affine).float() - weight).abs()
    # Below 5 bits codes are nearest on the unrounded levels; two of them lie within 3% of a step each.
    step = affine.scale.float().repeat_interleave(16 // affine.scale.shape[-1], -1)
    assert (mine <= smallest + (0.06 if grid.bits < 5 else 1e-4) * step).all()


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp4", "fp8"])
def test_quiet_weights_keep_their_bits_in_fp16(kind: str, clipped: bool) -> None:
    weight = (torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 2e-4).half().float()
    errors = []
    for dtype in (torch.float16, torch.float32):
        grid = grid_of(Level(int(kind[-1]), 64, True, kind[:-1]), dtype)
        affine = grid.fit_clipped(weight) if clipped else grid.fit(weight)
        errors.append((grid.decode(grid.encode(weight, affine), affine).float() - weight).norm())
    assert errors[0] < 1.2 * errors[1]


@settings(max_examples=60)
@given(grids, st.integers(0, 1000))
def test_fit_gives_a_legal_grid(grid: IntegerGrid, seed: int) -> None:
    weight = random_weight(seed, 2, 5, 16)
    for affine in (grid.fit(weight), grid.fit_clipped(weight)):
        assert affine.scale.dtype == grid.scale_dtype and affine.zero_point.dtype == torch.uint8
        assert affine.scale.shape == affine.zero_point.shape == (2, 5, grid.groups(16))
        assert (affine.scale > 0).all() and torch.isfinite(affine.scale).all()
        assert (affine.zero_point <= grid.top).all()
        assert not grid.symmetric or (affine.zero_point == grid.middle).all()
        assert torch.equal(grid.decode(affine.zero_point, affine), torch.zeros(2, 5, grid.groups(16)).to(grid.scale_dtype))


def test_decode_rounds_once() -> None:
    grid = IntegerGrid(8, None, symmetric=False)
    codes = torch.arange(256, dtype=torch.uint8)[None]
    affine = Affine(torch.tensor([[1.0078125]]).bfloat16(), torch.tensor([[3]], dtype=torch.uint8))
    exact = (codes.double() - 3) * affine.scale.double()
    assert torch.equal(grid.decode(codes, affine), exact.float().bfloat16())


def test_min_max_clips_nothing_and_bounds_the_error_by_half_a_step() -> None:
    weight = random_weight(0, 32, 64)
    grid = IntegerGrid(4, 16, symmetric=False, scale_dtype=torch.float32)
    affine = grid.fit(weight)
    error = (grid.decode(grid.encode(weight, affine), affine) - weight).abs()
    step = affine.scale.repeat_interleave(16, -1)
    # The zero point is rounded, which may push one end of the range half a step out.
    assert (error <= step * 1.001).all() and (error <= step * 0.501).float().mean() > 0.95


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_search_is_never_worse_than_min_max(bits: int, symmetric: bool) -> None:
    weight, importance = random_weight(1, 3, 16, 64), torch.rand(3, 64, generator=torch.Generator().manual_seed(2))
    grid = IntegerGrid(bits, 16, symmetric, torch.float32)

    def error(affine: Affine) -> torch.Tensor:
        difference = grid.decode(grid.encode(weight, affine), affine) - weight
        return (difference.square() * importance[:, None]).unflatten(-1, (-1, 16)).sum(-1)

    plain, searched = error(grid.fit(weight)), error(grid.fit_clipped(weight, importance))
    assert (searched <= plain * (1 + 1e-5)).all() and searched.sum() < plain.sum()


def test_importance_of_each_weight_generalises_importance_of_each_input() -> None:
    weight, importance = random_weight(3, 3, 8, 32), torch.rand(3, 32, generator=torch.Generator().manual_seed(4))
    grid = IntegerGrid(3, 8, symmetric=False)
    by_input = grid.fit_clipped(weight, importance)
    by_weight = grid.fit_clipped(weight, importance[:, None].expand_as(weight))
    assert all(torch.equal(a, b) for a, b in zip(by_input, by_weight, strict=True))


def test_zero_groups_decode_to_zero() -> None:
    for symmetric in (False, True):
        grid = IntegerGrid(4, 8, symmetric)
        weight = torch.zeros(4, 16)
        affine = grid.fit(weight)
        assert (grid.decode(grid.encode(weight, affine), affine) == 0).all()


def test_stored_bits() -> None:
    assert IntegerGrid(4, 64, symmetric=False).bits_per_weight == 4 + 20 / 64
    assert IntegerGrid(4, 64, symmetric=True).bits_per_weight == 4.25
    assert IntegerGrid(3, 32, symmetric=True, scale_dtype=torch.float32).bits_per_weight == 4
    assert IntegerGrid(4, None, symmetric=True).stored_bits(1024) == 4 + 16 / 1024


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        IntegerGrid(9, 64, symmetric=False)
    with pytest.raises(ValueError, match=r"1, 2, 3, 4, 6, 8, 12, 16, 24, 48"):
        IntegerGrid(4, 64, symmetric=False).fit(torch.randn(4, 48))
