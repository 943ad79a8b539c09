"""Every solver takes a grid of values: as integers it gives what the integer grid gives, compiled or not."""

import pebble
import pytest
import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import BINARY, TERNARY, float_values, power_law, power_of_two, quantile_values
from assay.methods.solve import clip, gptq, nearest, two_sided
from assay.methods.solve.curvature import damage, damp, inverse_factor
from assay.methods.solve.refine import Problem, descend, objective, refit
from assay.methods.solve.wavefront import wavefront

SOLVERS = {"nearest": nearest, "clip": clip, "gptq": gptq, "two_sided": two_sided}
FP4 = float_values(2, 1)
TABLES = {
    "fp4": FP4, "fp6": float_values(3, 2), "fp8": float_values(4, 3, nans=True), "nf4": quantile_values(4),
    "nf2": quantile_values(2), "shift": power_of_two(3), "power": power_law(4, 0.6), "ternary": TERNARY, "binary": BINARY,
    "bytes": power_law(8, 1.0),
}  # fmt: skip


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(seed: int, *shape: int) -> Tensor:
    """Rows of very different size."""
    return normal(seed, *shape) * 10 ** normal(seed + 1, *shape[:-1], 1)


def moment(seed: int, batch: int, size: int) -> Tensor:
    sample = normal(seed, batch, 4 * size, size) @ (normal(seed + 1, batch, size, size) / size**0.5 + torch.eye(size))
    return sample.mT @ sample / sample.shape[-2]


def errors(grid: Grid, weight: Tensor, affine: Affine, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of each group."""
    squares = grid.squared_errors(weight, affine)
    if importance is not None:
        squares = squares * (importance if importance.dim() == weight.dim() else importance[..., None, :])
    return squares.double().unflatten(-1, (affine.scale.shape[-1], -1)).sum(-1)


# ---- the same as integers ----------------------------------------------------------------------


class Borrowed(TableGrid):
    """A table that takes its scales from the integer grid of as many bits."""

    def _integers(self) -> IntegerGrid:
        return IntegerGrid(self.bits, self.group_size, True, self.scale_dtype)

    def fit(self, weight: Tensor) -> Affine:
        affine = self._integers().fit(weight)
        return Affine(affine.scale, torch.zeros_like(affine.zero_point))

    def fit_clipped(self, weight: Tensor, importance: Tensor | None = None, *shrinks: object) -> Affine:
        affine = self._integers().fit_clipped(weight, importance)
        return Affine(affine.scale, torch.zeros_like(affine.zero_point))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("by_torch", [False, True])
def test_integers_as_a_table(monkeypatch: pytest.MonkeyPatch, name: str, bits: int, dtype: torch.dtype, by_torch: bool) -> None:
    if by_torch:
        monkeypatch.setattr(compiled, "runs_on", lambda tensor: False)
    half = 2 ** (bits - 1)
    integers, table = IntegerGrid(bits, 16, True, dtype), Borrowed(tuple(map(float, range(-half, half))), 16, dtype)
    weight, H, G = normal(11, 2, 24, 48), moment(12, 2, 48), moment(14, 2, 24)
    expected, found = (SOLVERS[name].solve(weight, grid, H, G) for grid in (integers, table))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.affine.scale, expected.affine.scale)
    assert torch.equal(table.decode(found.codes, found.affine), integers.decode(expected.codes, expected.affine))


# ---- solvers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp4", "nf4", "nf2", "shift", "binary", "fp8"])
@pytest.mark.parametrize("scale_format", ["dtype", "e8m0", "nvfp4"])
def test_order_of_the_solvers(name: str, scale_format: str) -> None:
    grid = TableGrid(TABLES[name], 16, scale_format=scale_format)
    weight, H, G = normal(20, 4, 32, 64), moment(21, 4, 64), moment(23, 4, 32)
    price = {}
    for solver, module in SOLVERS.items():
        rounded = module.solve(weight, grid, H, G)
        assert torch.equal(grid.round_scale(rounded.affine.scale.float()), rounded.affine.scale)
        price[solver] = float(damage(weight - grid.decode(rounded.codes, rounded.affine).float(), H, G).sum())
    assert price["two_sided"] < 0.9 * price["gptq"] < 0.9 * price["clip"] < price["nearest"]


def test_order_of_the_solvers_on_real_weights() -> None:
    grid = TableGrid(FP4, 16, scale_format="nvfp4")
    total = dict.fromkeys(SOLVERS, 0.0)
    for weight, H, G in pebble.block().values():
        for name, module in SOLVERS.items():
            rounded = module.solve(weight, grid, H, G)
            total[name] += float(damage(weight - grid.decode(rounded.codes, rounded.affine).float(), H, G))
    assert total["two_sided"] < 0.75 * total["gptq"] < 0.5 * total["clip"] < 0.5 * total["nearest"]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale_format", ["dtype", "nvfp4"])
def test_a_batch_is_solved_as_its_members_alone(name: str, scale_format: str) -> None:
    grid = TableGrid(quantile_values(3), 8, scale_format=scale_format)
    weight, H, G = uneven(30, 3, 24, 32), moment(31, 3, 32), moment(33, 3, 24)
    together = SOLVERS[name].solve(weight, grid, H, G)
    for a in range(3):
        alone = SOLVERS[name].solve(weight[a], grid, H[a], G[a])
        assert torch.equal(alone.codes, together.codes[a])
        assert torch.equal(alone.affine.scale, together.affine.scale[a])


@pytest.mark.parametrize("name", ["fp4", "nf4", "shift", "bytes"])
def test_refinement_never_raises_the_objective(name: str) -> None:
    grid = TableGrid(TABLES[name], 8)
    weight = normal(40, 2, 16, 32)
    problem = Problem(weight, damp(moment(41, 2, 32), 0.01), damp(moment(43, 2, 16), 0.01), grid)
    affine = grid.fit_clipped(weight)
    steps = torch.tensor(grid.values)[grid.encode(weight, affine).int()]
    start = value = objective(problem, steps, affine)
    for _ in range(3):
        for change in ("descend", "refit"):
            if change == "refit":
                affine = refit(problem, steps, affine)
            else:
                steps = descend(problem, steps, affine)
            assert torch.isin(steps, torch.tensor(grid.values)).all()
            after = objective(problem, steps, affine)
            assert (after <= value * (1 + 1e-5)).all()
            value = after
    assert (value < start).all()


# ---- compiled ----------------------------------------------------------------------------------

CASES = [(n, d, "dtype") for n in TABLES for d in (torch.bfloat16, torch.float32)] + [
    (n, torch.bfloat16, f) for n in ("fp4", "fp8") for f in ("e8m0", "nvfp4")
]


@pytest.mark.parametrize(("name", "dtype", "scale_format"), CASES)
@pytest.mark.parametrize("importance", ["none", "input", "weight"])
def test_compiled_scale_search(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, scale_format: str, importance: str
) -> None:
    grid, weight = TableGrid(TABLES[name], 16, dtype, scale_format), normal(50, 2, 12, 48)
    weight[0, 0] = 0
    cost = {"none": None, "input": normal(51, 2, 48).square(), "weight": normal(52, 2, 12, 48).square()}[importance]
    ours = grid.fit_clipped(weight, cost)
    monkeypatch.setattr(compiled, "runs_on", lambda tensor: False)
    theirs = grid.fit_clipped(weight, cost)
    # sums in another order may break a tie the other way: the error reached is what must agree
    torch.testing.assert_close(*(errors(grid, weight, a, cost) for a in (ours, theirs)), rtol=1e-4, atol=1e-12)
    assert dtype == torch.float32 or (ours.scale == theirs.scale).float().mean() > 0.98


@pytest.mark.parametrize(("name", "dtype", "scale_format"), CASES)
def test_compiled_waves(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, scale_format: str) -> None:
    grid, weight = TableGrid(TABLES[name], 16, dtype, scale_format), normal(53, 2, 40, 48)
    factors = [inverse_factor(moment(seed, 2, size), 0.01)[0] for seed, size in ((54, 48), (56, 40))]
    parameters = grid.per_weight(grid.fit_clipped(weight), 48)
    ours = wavefront(weight, factors[0], factors[1], grid, parameters, tile=16)
    monkeypatch.setattr(compiled, "runs_on", lambda tensor: False)
    theirs = wavefront(weight, factors[0], factors[1], grid, parameters, tile=16)
    torch.testing.assert_close(ours.centred, theirs.centred, rtol=0, atol=0)
    torch.testing.assert_close(ours.targets, theirs.targets, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp4", "nf2", "bytes"])
def test_compiled_descent_ends_in_a_local_optimum_about_as_good(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    grid, weight = TableGrid(TABLES[name], 16), normal(58, 30, 24, 32)
    problem = Problem(weight, moment(59, 30, 32), moment(61, 30, 24), grid)
    affine = grid.fit_clipped(weight)
    start = torch.tensor(grid.values)[grid.encode(weight, affine).int()]
    ours = descend(problem, start, affine, sweeps=30)
    assert torch.equal(descend(problem, ours, affine), ours)
    monkeypatch.setattr(compiled, "runs_on", lambda tensor: False)
    assert torch.equal(descend(problem, ours, affine), ours), "the torch descent still finds a move"
    theirs = descend(problem, start, affine, sweeps=30)
    reached, other = (float(objective(problem, steps, affine).sum()) for steps in (ours, theirs))
    assert reached < 1.06 * other


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_results(threads: int) -> None:
    before = torch.get_num_threads()
    grid, weight = TableGrid(quantile_values(4), 16), normal(62, 5, 24, 32)
    expected = grid.fit_clipped(weight)
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, grid.fit_clipped(weight), expected))
    finally:
        torch.set_num_threads(before)
