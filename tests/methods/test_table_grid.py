"""Grids of values: what is stored is what is decoded, codes are nearest, scales are found."""

import pebble
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.scales import split_e8m0, split_nvfp4
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import BINARY, TERNARY, float_values, power_law, power_of_two, quantile_values

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP4 = float_values(2, 1)
TABLES = {
    "fp4": FP4, "fp6": float_values(3, 2), "fp8": float_values(4, 3, nans=True), "nf4": quantile_values(4),
    "nf2": quantile_values(2), "shift": power_of_two(3), "power": power_law(4, 0.6), "ternary": TERNARY, "binary": BINARY,
    "bytes": power_law(8, 1.0),
}  # fmt: skip
grids = st.builds(
    TableGrid,
    values=st.sampled_from(list(TABLES.values())),
    group_size=st.sampled_from([None, 1, 4, 8]),
    scale_dtype=st.sampled_from(DTYPES),
    scale_format=st.sampled_from(["dtype", "e8m0", "nvfp4"]),
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(seed: int, *shape: int) -> Tensor:
    """Rows of very different size."""
    return normal(seed, *shape) * 10 ** normal(seed + 1, *shape[:-1], 1)


def every_level(grid: TableGrid, affine: Affine, inputs: int) -> tuple[Tensor, Tensor]:
    """All codes at every weight [levels, ..., out, in], and what they decode to."""
    count, shape = len(grid.values), (*affine.scale.shape[:-1], inputs)
    codes = torch.arange(count, dtype=torch.uint8).view(-1, *(1 for _ in shape)).expand(count, *shape)
    return codes, grid.decode(codes, Affine(*(p.expand(count, *p.shape) for p in affine)))


# ---- storage -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(grids, st.integers(0, 1000), st.booleans())
def test_every_value_survives_encode_and_decode(grid: TableGrid, seed: int, clipped: bool) -> None:
    weight = uneven(seed, 5, 16)
    affine = grid.fit_clipped(weight) if clipped else grid.fit(weight)
    codes, levels = every_level(grid, affine, 16)
    assert levels.dtype == grid.scale_dtype
    wide = Affine(*(p.expand(len(codes), -1, -1) for p in affine))
    assert torch.equal(grid.decode(grid.encode(levels, wide), wide), levels)
    distinct = (levels[1:] != levels[:-1]).all()
    assert not distinct or torch.equal(grid.encode(levels, wide), codes)
    if grid.has_zero:
        assert (levels[grid.values.index(0)] == 0).all()


@settings(max_examples=60)
@given(grids, st.integers(0, 1000))
def test_encoding_is_nearest(grid: TableGrid, seed: int) -> None:
    weight = uneven(seed, 5, 16)
    affine = grid.fit_clipped(weight)
    levels = every_level(grid, affine, 16)[1].float()
    distances = (levels - weight).abs()
    mine = (grid.decode(grid.encode(weight, affine), affine).float() - weight).abs()
    gaps = (levels[1:] - levels[:-1]).abs().amax(0)
    # Unless `fine`, codes are nearest on unrounded levels: two of them lie within 1/16 of a gap each.
    assert (mine <= distances.amin(0) + (1e-4 if grid.fine else 0.125) * gaps).all()


@pytest.mark.parametrize("name", TABLES)
def test_encoding_is_exactly_nearest_where_levels_are_exact(name: str) -> None:
    grid = TableGrid(TABLES[name], None, torch.float32)
    steps = torch.tensor(grid.values)
    low, high = grid.values[0], grid.values[-1]
    values = torch.linspace(1.2 * low, 1.2 * high, 4001)
    unit = Affine(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    found = steps[grid.encode(values[None], unit)[0].int()].double()
    best = (steps.double()[:, None] - values.double()).abs().amin(0)
    assert torch.equal((found - values.double()).abs(), best)


@pytest.mark.parametrize("name", ["fp4", "fp6", "fp8", "bytes"])
def test_ties_go_to_the_even_code(name: str) -> None:
    grid = TableGrid(TABLES[name], None, torch.float32)
    steps = torch.tensor(grid.values)
    middles = ((steps[1:].double() + steps[:-1]) / 2).float()
    unit = Affine(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    codes = grid.encode(middles[None], unit)[0].int()
    assert ((codes - grid.values.index(0)) % 2 == 0).all()
    if name == "fp8":
        assert torch.equal(steps[codes], middles.to(torch.float8_e4m3fn).float())
    if name == "bytes":
        assert torch.equal(steps[codes], middles.round())


@settings(max_examples=60)
@given(grids, st.integers(0, 1000))
def test_fit_gives_a_legal_grid(grid: TableGrid, seed: int) -> None:
    weight = uneven(seed, 2, 5, 16)
    weight[0, 0] = 0
    for affine in (grid.fit(weight), grid.fit_clipped(weight)):
        assert affine.scale.dtype == grid.scale_dtype and affine.scale.shape == (2, 5, grid.groups(16))
        assert affine.zero_point.dtype == torch.uint8 and affine.zero_point.shape == affine.scale.shape
        assert torch.isfinite(affine.scale).all() and (affine.scale != 0).all()
        assert grid.mirrored or (affine.scale > 0).all()
        assert torch.equal(grid.round_scale(affine.scale.float()), affine.scale)
        levels = grid.decode(grid.encode(weight, affine), affine)
        assert (levels[0, 0].abs() <= (0 if grid.has_zero else 0.02 * weight.abs().max())).all()
        if grid.scale_format == "e8m0":
            split_e8m0(affine.scale)
        if grid.scale_format == "nvfp4":
            split_nvfp4(affine.scale)


def test_stored_bits() -> None:
    assert TableGrid(FP4, 32, scale_format="e8m0").stored_bits(4096) == 4.25
    nvfp4 = TableGrid(FP4, 16, scale_format="nvfp4")
    assert nvfp4.bits_per_weight == 4.5 and nvfp4.tensor_bits == 32
    assert TableGrid(quantile_values(4), 64, torch.float32).bits_per_weight == 4.5
    assert TableGrid(quantile_values(3), 64).bits_per_weight == 3.25
    assert TableGrid(TABLES["fp8"], None).stored_bits(1024) == 8 + 16 / 1024
    assert [TableGrid(TABLES[name], None).bits for name in ("binary", "ternary", "nf2", "shift", "fp4", "fp6")] == [
        1,
        2,
        2,
        3,
        4,
        6,
    ]


def test_bad_tables_are_refused() -> None:
    for values, words in (((0.0,), "2 to 256"), ((1.0, -1.0), "rising"), ((0.0, 1.0), "both signs")):
        with pytest.raises(ValueError, match=words):
            TableGrid(values, 64)
    with pytest.raises(ValueError, match="1, 2, 3, 4, 6, 8, 12, 16, 24, 48"):
        TableGrid(FP4, 64).fit(torch.randn(4, 48))


# ---- fitting -----------------------------------------------------------------------------------


def errors(grid: Grid, weight: Tensor, affine: Affine, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of each group."""
    squares = grid.squared_errors(weight, affine)
    if importance is not None:
        squares = squares * (importance if importance.dim() == weight.dim() else importance[..., None, :])
    return squares.double().unflatten(-1, (affine.scale.shape[-1], -1)).sum(-1)


@pytest.mark.parametrize("name", TABLES)
def test_the_plain_fit_covers(name: str) -> None:
    grid, weight = TableGrid(TABLES[name], 16, torch.float32), uneven(0, 32, 64)
    affine = grid.fit(weight)
    ends = affine.scale[..., None] * torch.tensor([grid.values[0], grid.values[-1]])
    groups = weight.unflatten(-1, (-1, 16))
    slack = (1 + 1e-6) * ends
    assert ((groups >= slack[..., :1]) & (groups <= slack[..., 1:])).all()
    touches = (groups.amax(-1) >= ends[..., 1] * (1 - 1e-6)) | (groups.amin(-1) <= ends[..., 0] * (1 - 1e-6))
    assert touches.all()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale_format", ["dtype", "e8m0", "nvfp4"])
def test_the_search_is_never_worse_than_the_plain_fit(name: str, scale_format: str) -> None:
    weight, importance = normal(1, 3, 16, 64), normal(2, 3, 64).square()
    grid = TableGrid(TABLES[name], 16, scale_format=scale_format)
    plain, searched = (errors(grid, weight, a, importance) for a in (grid.fit(weight), grid.fit_clipped(weight, importance)))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert name == "fp6" or searched.sum() < 0.995 * plain.sum()
    assert (errors(grid, weight, grid.fit_clipped(weight, importance, ()), importance) <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("name", "slack"), [("fp4", 1.05), ("nf4", 1.05), ("shift", 1.05), ("ternary", 1.01), ("binary", 1.0001)]
)
def test_the_search_comes_close_to_the_best_scale(name: str, slack: float) -> None:
    weight, grid = normal(3, 16, 64), TableGrid(TABLES[name], 16, torch.float32)
    found = errors(grid, weight, grid.fit_clipped(weight))
    cover = grid.fit(weight)
    sides = (1, -1) if grid.mirrored else (1,)
    every = [Affine(cover.scale * side * i / 200, cover.zero_point) for i in range(20, 400) for side in sides]
    best = torch.stack([errors(grid, weight, a) for a in every]).amin(0)
    assert found.sum() <= slack * best.sum()


def test_binary_and_ternary_scales_are_the_closed_forms() -> None:
    weight = normal(4, 8, 64)
    scale = TableGrid(BINARY, None, torch.float32).fit_clipped(weight).scale[:, 0]
    torch.testing.assert_close(scale, weight.abs().mean(-1))
    grid = TableGrid(TERNARY, None, torch.float32)
    affine = grid.fit_clipped(weight)
    kept = grid.encode(weight, affine) != 1
    assert torch.equal(kept, weight.abs() > affine.scale / 2)


def test_importance_of_each_weight_generalises_importance_of_each_input() -> None:
    weight, importance = normal(5, 3, 8, 32), normal(6, 3, 32).square()
    grid = TableGrid(FP4, 8)
    by_weight = grid.fit_clipped(weight, importance[:, None].expand_as(weight))
    assert all(torch.equal(a, b) for a, b in zip(grid.fit_clipped(weight, importance), by_weight, strict=True))


def test_a_lopsided_table_is_mirrored_where_that_pays() -> None:
    grid, weight = TableGrid(quantile_values(4), 64, torch.float32), normal(7, 64, 256)
    assert grid.mirrored and not TableGrid(FP4, 64).mirrored
    found, other = grid.fit_clipped(weight), grid.fit_clipped(-weight)
    assert 0.3 < (found.scale < 0).float().mean() < 0.7
    assert torch.equal(other.scale, -found.scale)
    one_sided = Affine(grid.fit_clipped(weight).scale.abs(), found.zero_point)
    assert errors(grid, weight, found).sum() < 0.97 * errors(grid, weight, one_sided).sum()


# ---- named formats -----------------------------------------------------------------------------


def test_microscaling_takes_the_rule_of_its_specification() -> None:
    weight = uneven(8, 16, 64)
    grid = TableGrid(FP4, 32, scale_format="e8m0")
    largest = weight.unflatten(-1, (2, 32)).abs().amax(-1)
    assert torch.equal(grid.fit(weight).scale.float(), 2.0 ** (largest.log2().floor() - 2))
    scale = grid.fit_clipped(weight).scale
    assert torch.equal(scale, 2.0 ** scale.float().log2().round())


def rounding_error(grid: Grid, weights: list[Tensor], clipped: bool) -> float:
    """Squared error relative to the weights', mean over matrices."""
    found = [grid.squared_errors(w, grid.fit_clipped(w) if clipped else grid.fit(w)).sum() / w.square().sum() for w in weights]
    return float(sum(found) / len(found))


@pytest.mark.parametrize("clipped", [False, True])
def test_formats_in_their_order_on_gaussian_weights(clipped: bool) -> None:
    _check_order([normal(9, 256, 512)], clipped)


@pytest.mark.parametrize("clipped", [False, True])
def test_formats_in_their_order_on_real_weights(clipped: bool) -> None:
    _check_order(list(pebble.weights().values())[::5], clipped)


def _check_order(weights: list[Tensor], clipped: bool) -> None:
    nvfp4 = rounding_error(TableGrid(FP4, 16, scale_format="nvfp4"), weights, clipped)
    mxfp4 = rounding_error(TableGrid(FP4, 32, scale_format="e8m0"), weights, clipped)
    nf4 = rounding_error(TableGrid(quantile_values(4), 64), weights, clipped)
    int4 = rounding_error(IntegerGrid(4, 64, symmetric=True), weights, clipped)
    assert nvfp4 < 0.75 * mxfp4
    assert nf4 < 0.85 * int4
    fp8 = [rounding_error(TableGrid(TABLES["fp8"], size), weights, clipped) for size in (None, 16)]
    mxfp6 = rounding_error(TableGrid(float_values(2, 3), 32, scale_format="e8m0"), weights, clipped)
    assert max(fp8) < 1.3 * mxfp6 < 0.2 * nf4


def test_a_power_of_two_for_the_whole_matrix_costs_nothing() -> None:
    weight = normal(10, 256, 512)
    largest = weight.unflatten(-1, (-1, 16)).abs().amax(-1) / 6
    free = largest.max() / 448
    scale = (largest / free).to(torch.float8_e4m3fn).float() * free
    grid = TableGrid(FP4, 16, torch.float32, "nvfp4")
    any_scale, ours = (errors(grid, weight, a).sum() for a in (Affine(scale, scale.to(torch.uint8)), grid.fit(weight)))
    assert abs(ours / any_scale - 1) < 0.01
