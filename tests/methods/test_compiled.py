"""The compiled loops against the torch definitions that run on other devices."""

import pytest
import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import quantile_values
from assay.methods.solve import gptq
from assay.methods.solve.curvature import inverse_factor, take_columns
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.refine import Problem, descend, objective
from assay.methods.solve.wavefront import wavefront

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, batch: int, size: int) -> Tensor:
    sample = normal(seed, batch, 4 * size, size) @ (normal(seed + 1, batch, size, size) / size**0.5 + torch.eye(size))
    return sample.mT @ sample / sample.shape[-2]


def by_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compiled, "runs_on", lambda tensor: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("importance", ["none", "input", "weight"])
def test_clip_search(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, symmetric: bool, bits: int, importance: str) -> None:
    grid = IntegerGrid(bits, 16, symmetric, dtype)
    weight = normal(bits, 2, 12, 48)
    weight[0, 0] = 0
    weight[0, 1] *= 1e-5
    cost = {"none": None, "input": normal(1, 2, 48).square(), "weight": normal(2, 2, 12, 48).square()}[importance]
    ours = grid.fit_clipped(weight, cost)
    by_torch(monkeypatch)
    theirs = grid.fit_clipped(weight, cost)
    # sums in another order may break a tie the other way: the error reached is what must agree
    found = [_error(grid, weight, affine, cost) for affine in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    if dtype != torch.float32:
        assert (ours.scale == theirs.scale).float().mean() > 0.99


@pytest.mark.parametrize("size", [16, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_row_costs(monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, size: int | None) -> None:
    grid, weight = IntegerGrid(bits, size, symmetric, torch.float32), normal(bits, 12, 48)
    cost, other = normal(1, 48).square(), normal(2, 48).square()
    ours = grid.row_costs(weight, cost, other)
    by_torch(monkeypatch)
    for mine, theirs in zip(ours, grid.row_costs(weight, cost, other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)


def _error(grid: IntegerGrid, weight: Tensor, affine: Affine, cost: Tensor | None) -> Tensor:
    errors = grid.squared_errors(weight, affine)
    if cost is not None:
        errors = errors * (cost if cost.dim() == 3 else cost[:, None])
    return errors.unflatten(-1, (-1, 16)).double().sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_waves_choose_the_same_codes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int) -> None:
    grid = IntegerGrid(bits, 16, False, dtype)
    weight = normal(3, 2, 40, 48)
    factors = [inverse_factor(moment(seed, 2, size), 0.01)[0] for seed, size in ((4, 48), (6, 40))]
    affine = grid.fit(weight)
    ours = wavefront(weight, factors[0], factors[1], grid, grid.per_weight(affine, 48), tile=16)
    by_torch(monkeypatch)
    theirs = wavefront(weight, factors[0], factors[1], grid, grid.per_weight(affine, 48), tile=16)
    torch.testing.assert_close(ours.centred, theirs.centred, rtol=0, atol=0)
    torch.testing.assert_close(ours.targets, theirs.targets, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_of_rounding_to_nearest(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, symmetric: bool, bits: int) -> None:
    grid = IntegerGrid(bits, 16, symmetric, dtype)
    weight = normal(5, 2, 12, 48)
    affine = grid.fit_clipped(weight)
    ours = grid.squared_errors(weight, affine)
    by_torch(monkeypatch)
    torch.testing.assert_close(ours.sqrt(), grid.squared_errors(weight, affine).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "grid", [IntegerGrid(b, 16, False, d) for b in (2, 4, 6) for d in DTYPES] + [TableGrid(quantile_values(4), 16)], ids=str
)
def test_gptq_chooses_the_same_codes(grid: Grid) -> None:
    weight, h = normal(3, 2, 40, 96), moment(4, 2, 96)
    ours = gptq.solve(weight, grid, h)
    seen = gptq.visit(weight, h, True, gptq.INPUT_SHRINKAGE, gptq.DAMPING)
    quantizer = gptq.FixedGrid(grid, ours.affine, seen.order)
    column_feedback(take_columns(weight, seen.order), seen.factor, quantizer)
    codes = take_columns(quantizer.codes.mT, seen.order.argsort(-1))
    assert (ours.codes == codes).float().mean() > 0.99  # a tie that last bits decide moves what comes after it
    changes = [grid.decode(c, ours.affine).float() - weight for c in (ours.codes, codes)]
    damage = [((d @ h) * d).sum(dtype=torch.float64) for d in changes]
    torch.testing.assert_close(*damage, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 6])
def test_descent_ends_in_a_local_optimum_about_as_good(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int) -> None:
    grid = IntegerGrid(bits, 16, False, dtype)
    weight = normal(8, 30, 24, 32)
    problem = Problem(weight, moment(9, 30, 32), moment(11, 30, 24), grid)
    affine = grid.fit(weight)
    start = grid.encode(weight, affine).float() - affine.zero_point.float().repeat_interleave(16, -1)
    ours = descend(problem, start, affine, sweeps=30)
    assert torch.equal(descend(problem, ours, affine), ours)
    reached = objective(problem, ours, affine)
    by_torch(monkeypatch)
    theirs = descend(problem, start, affine, sweeps=30)
    assert torch.equal(descend(problem, ours, affine), ours), "the torch descent still finds a move"
    assert float(reached.sum()) < 1.06 * float(objective(problem, theirs, affine).sum())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_results(threads: int) -> None:
    before = torch.get_num_threads()
    grid, weight = IntegerGrid(3, 16, False), normal(12, 5, 24, 32)
    expected = grid.fit_clipped(weight)
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, grid.fit_clipped(weight), expected))
    finally:
        torch.set_num_threads(before)
