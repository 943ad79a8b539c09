"""Groups along the outputs: columns are isolated from each other, and feedback still works."""

import pebble
import pytest
import torch
from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import float_values, quantile_values
from assay.methods.solve import by_input, clip, gptq, nearest
from assay.methods.solve.curvature import damage, inverse_factor, shrink
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.rounded import Rounded

GRIDS = {
    "int": IntegerGrid(3, 8, symmetric=False),
    "int_sym": IntegerGrid(4, 8, symmetric=True),
    "nf4": TableGrid(quantile_values(4), 8),
    "mxfp4": TableGrid(float_values(2, 1), 8, scale_format="e8m0"),
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, size: int, *batch: int) -> Tensor:
    sample = normal(seed, *batch, 4 * size, size) @ (normal(seed + 1, *batch, size, size) / size**0.5 + torch.eye(size))
    return sample.mT @ sample / sample.shape[-2]


def decoded(grid: Grid, rounded: Rounded) -> Tensor:
    return by_input.decode(rounded, grid).float()


def scaled(weight: Tensor, column: int, factor: float) -> Tensor:
    other = weight.clone()
    other[..., column] *= factor
    return other


# ---- isolation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("shrinks", [None, (1.0, 0.8, 0.6)])
def test_a_loud_column_changes_nothing_but_itself(name: str, shrinks: tuple[float, ...] | None) -> None:
    grid, weight = GRIDS[name], normal(0, 2, 24, 16)
    before = decoded(grid, by_input.nearest(weight, grid, shrinks=shrinks))
    after = decoded(grid, by_input.nearest(scaled(weight, 5, 64), grid, shrinks=shrinks))
    assert torch.equal(after, scaled(before, 5, 64))
    along = nearest if shrinks is None else clip
    rows = [along.solve(w, grid) for w in (weight, scaled(weight, 5, 64))]
    quiet, loud = (grid.decode(r.codes, r.affine).float() for r in rows)
    assert not torch.equal(loud[..., :5], quiet[..., :5])  # its neighbours in groups along the inputs


@pytest.mark.parametrize("name", GRIDS)
def test_scaling_columns_is_useless_also_under_feedback(name: str) -> None:
    """W S with H of S^-1 x is the same problem, and powers of two keep every digit."""
    grid, weight, H = GRIDS[name], normal(1, 24, 16), moment(2, 16)
    powers = 2.0 ** torch.randint(-6, 7, (16,), generator=torch.Generator().manual_seed(3))
    options = {"act_order": False, "shrinkage": 0.0, "damping": 0.0}
    plain = by_input.gptq(weight, grid, H, **options)
    folded = by_input.gptq(weight * powers, grid, H / powers[:, None] / powers, **options)
    assert torch.equal(folded.codes, plain.codes)
    assert torch.equal(decoded(grid, folded), decoded(grid, plain) * powers)


# ---- the quantizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_squared_errors_sum_to_the_price(name: str) -> None:
    grid, weight, H = GRIDS[name], normal(4, 2, 24, 40), moment(5, 40, 2)
    factor, used = inverse_factor(H, 0.0)
    assert used == 0
    quantizer = by_input.ColumnGroups(grid)
    errors = column_feedback(weight, factor, quantizer)
    codes, scale, zero = quantizer.results()
    assert codes.shape == (2, 24, 40) and scale.shape == zero.shape == (2, 3, 40)
    difference = weight - decoded(grid, Rounded(codes, Affine(scale, zero)))
    torch.testing.assert_close(2 * damage(difference, H), errors.square().sum((1, 2)))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
def test_diagonal_curvature_is_plain_rounding(name: str, act_order: bool) -> None:
    grid, weight = GRIDS[name], normal(6, 16, 32)
    H = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(7)) + 0.1)
    for G in (None, moment(8, 16)):
        fed, plain = by_input.gptq(weight, grid, H, G, act_order=act_order), by_input.nearest(weight, grid, G)
        assert torch.equal(fed.codes, plain.codes) and torch.equal(fed.affine.scale, plain.affine.scale)
        bare = by_input.gptq(weight, grid, None, G)
        assert torch.equal(bare.codes, plain.codes)


@pytest.mark.parametrize("name", GRIDS)
def test_feedback_lowers_the_price(name: str) -> None:
    grid, weight, H = GRIDS[name], normal(9, 3, 48, 32), shrink(moment(10, 32, 3), 0.0)
    plain, fed = (decoded(grid, r) for r in (by_input.nearest(weight, grid), by_input.gptq(weight, grid, H)))
    assert (damage(weight - fed, H) < 0.8 * damage(weight - plain, H)).all()
    alone = by_input.gptq(weight[1], grid, H[1])
    assert torch.equal(decoded(grid, alone), fed[1])


def test_outputs_weigh_the_errors_of_a_group() -> None:
    grid, weight, G = GRIDS["int"], normal(11, 32, 16), torch.diag(normal(12, 32).exp().square())
    plain, weighted = (decoded(grid, by_input.nearest(weight, grid, g)) for g in (None, G))
    identity = torch.eye(16)
    assert damage(weight - weighted, identity, G) < 0.97 * damage(weight - plain, identity, G)


def test_quiet_weights_are_spared_along_the_axis_of_the_outliers() -> None:
    grid = TableGrid(float_values(2, 1), 64)
    loud = torch.zeros(128, 128, dtype=torch.bool)
    loud[:, ::16] = True
    for mask, by_column_wins in ((loud, True), (loud.T, False)):
        weight = torch.where(mask, 30.0, 1.0) * normal(13, 128, 128)
        along = clip.solve(weight, grid)
        per_row = (grid.decode(along.codes, along.affine).float() - weight)[~mask].square().sum()
        per_column = (decoded(grid, by_input.nearest(weight, grid)) - weight)[~mask].square().sum()
        assert (per_column < 0.1 * per_row) if by_column_wins else (per_row < 0.1 * per_column)


def test_the_better_axis_of_each_matrix_wins_on_real_weights() -> None:
    """AdaDim: choosing per matrix is never worse than either axis for all, here with feedback on both."""
    grid = IntegerGrid(3, 64, symmetric=False)
    total = dict.fromkeys(("oc", "ic", "best", "ic_plain"), 0.0)
    for weight, H, _ in pebble.block().values():
        along = gptq.solve(weight, grid, H)
        oc = float(damage(weight - grid.decode(along.codes, along.affine).float(), H))
        ic = float(damage(weight - decoded(grid, by_input.gptq(weight, grid, H)), H))
        plain = float(damage(weight - decoded(grid, by_input.nearest(weight, grid)), H))
        for key, price in (("oc", oc), ("ic", ic), ("best", min(oc, ic)), ("ic_plain", plain)):
            total[key] += price
    assert total["best"] <= min(total["oc"], total["ic"])
    assert total["ic"] < 0.7 * total["ic_plain"]


# ---- refusals ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    weight, H = normal(15, 24, 32), moment(16, 32)
    with pytest.raises(ValueError, match="groups of 16 do not divide 24"):
        by_input.gptq(weight, IntegerGrid(4, 16, True), H)
    with pytest.raises(ValueError, match="NVFP4"):
        by_input.gptq(weight, TableGrid(float_values(2, 1), 8, scale_format="nvfp4"), H)
    with pytest.raises(ValueError, match="G has shape"):
        by_input.nearest(weight, GRIDS["int"], H)
