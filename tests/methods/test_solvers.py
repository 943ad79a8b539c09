"""Rounding solvers: identities that hold exactly, and an order of quality on real weights."""

from itertools import product

import pebble
import pytest
import torch
from torch import Tensor

from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import clip, gptq, nearest, two_sided
from assay.methods.solve.curvature import DAMPING, damage, damp, dampings, inverse_factor, most, shrink
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.refine import Problem, descend, least_squares_scales, objective, refit
from assay.methods.solve.rounded import Rounded
from assay.methods.solve.wavefront import wavefront

SOLVERS = {"nearest": nearest, "clip": clip, "gptq": gptq, "two_sided": two_sided}
GRID = IntegerGrid(3, 8, symmetric=False)


def moment(seed: int, size: int, batch: tuple[int, ...] = (), rank: int | None = None) -> Tensor:
    """A correlated second moment [*batch, size, size] of a sample of `rank` vectors."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(*batch, size, size, generator=generator) / size**0.5 + torch.eye(size)
    sample = torch.randn(*batch, rank or 4 * size, size, generator=generator) @ mixing
    return sample.mT @ sample / sample.shape[-2]


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(grid: IntegerGrid, rounded: Rounded) -> Tensor:
    return grid.decode(rounded.codes, rounded.affine).float()


def same(one: Rounded, other: Rounded) -> bool:
    return torch.equal(one.codes, other.codes) and all(map(torch.equal, one.affine, other.affine))


# ---- error feedback ----------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_squared_errors_sum_to_the_damped_price(act_order: bool) -> None:
    weight, H = weights(0, 2, 24, 40), moment(1, 40, (2,))
    grid = IntegerGrid(3, 8, symmetric=False, scale_dtype=torch.float32)
    factor, used = inverse_factor(H, 0.01)
    assert used == 0.01
    order = torch.arange(40).expand(2, -1)
    quantizer = gptq.FixedGrid(grid, grid.fit(weight), order)
    errors = column_feedback(weight, factor, quantizer)
    difference = weight - grid.decode(quantizer.codes.mT, grid.fit(weight))
    torch.testing.assert_close(2 * damage(difference, damp(H, 0.01)), errors.square().sum((1, 2)))


@pytest.mark.parametrize("block", [1, 16, 64])
def test_block_size_does_not_change_codes(block: int) -> None:
    weight, H = weights(2, 24, 64), moment(3, 64)
    assert same(gptq.solve(weight, GRID, H, block=block), gptq.solve(weight, GRID, H))


@pytest.mark.parametrize("tile", [1, 4, 16, 64])
def test_tile_size_does_not_change_codes(tile: int) -> None:
    weight, H, G = weights(4, 20, 40), moment(5, 40), moment(6, 20)
    assert same(two_sided.solve(weight, GRID, H, G, tile=tile), two_sided.solve(weight, GRID, H, G))


@pytest.mark.parametrize("clipped", [False, True])
def test_diagonal_curvature_is_plain_rounding(clipped: bool) -> None:
    weight, H = weights(7, 16, 32), torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(8)) + 0.1)
    plain = clip.solve(weight, GRID, damp(H, 0.01)) if clipped else nearest.solve(weight, GRID)
    assert same(gptq.solve(weight, GRID, H, clipped=clipped), plain)


def test_feedback_with_independent_outputs_is_gptq() -> None:
    weight, H = weights(9, 16, 32), moment(10, 32)
    G = torch.diag(torch.rand(16, generator=torch.Generator().manual_seed(11)) + 0.1)
    options = {"shrink_inputs": 0.0, "second_grid": False, "refits": 0}
    alone = gptq.solve(weight, GRID, H, shrinkage=0.0)
    assert same(two_sided.solve(weight, GRID, H, G, **options), alone)
    assert same(two_sided.solve(weight, GRID, H, None, **options), alone)


def test_two_sided_feedback_is_nearest_plane_on_the_kronecker_product() -> None:
    rows, columns = 5, 7
    weight, H, G = weights(12, rows, columns), moment(13, columns), moment(14, rows)
    grid = IntegerGrid(2, None, symmetric=False)
    affine = grid.fit(weight)
    scale, low, high = grid.per_weight(affine, columns)
    upper, over = inverse_factor(H, 0.0)[0], inverse_factor(G, 0.0)[0]
    wave = wavefront(weight[None], upper[None], over[None], grid, (scale[None], low[None], high[None]), tile=4)
    joint = torch.kron(over, upper)
    values = weight.flatten().clone()
    for k in range(rows * columns):
        i, j = divmod(k, columns)
        code = grid.snap(values[k], scale[i, j], low[i, j], high[i, j])
        assert code == wave.centred[0, i, j]
        torch.testing.assert_close(values[k], wave.targets[0, i, j])
        values -= (values[k] - grid.level(code, scale[i, j])) / joint[k, k] * joint[k]


# ---- refinement --------------------------------------------------------------------------------


def rough(seed: int, bits: int = 2) -> tuple[Problem, Tensor, Affine]:
    """A batch of two problems rounded to nearest."""
    weight, H, G = weights(seed, 2, 16, 32), moment(seed + 1, 32, (2,)), moment(seed + 2, 16, (2,))
    grid = IntegerGrid(bits, 8, symmetric=False)
    affine = grid.fit(weight)
    centred = grid.encode(weight, affine) - grid.per_weight(affine, 32)[1].neg()
    return Problem(weight, damp(H, 0.01), damp(G, 0.01), grid), centred, affine


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_descent_and_refit_never_raise_the_objective(bits: int) -> None:
    for seed in range(5):
        problem, centred, affine = rough(seed, bits)
        value = start = objective(problem, centred, affine)
        for _ in range(4):
            centred = descend(problem, centred, affine)
            assert (objective(problem, centred, affine) <= value * (1 + 1e-5)).all()
            value = objective(problem, centred, affine)
            affine = refit(problem, centred, affine)
            assert (objective(problem, centred, affine) <= value).all()
            value = objective(problem, centred, affine)
        assert (value < start).all()


def test_descent_ends_where_no_single_code_can_move() -> None:
    problem, centred, affine = rough(20)
    centred = descend(problem, centred, affine, sweeps=60)
    value = objective(problem, centred, affine)
    _, low, high = problem.grid.per_weight(affine, 32)
    for i, j in product(range(16), range(0, 32, 5)):
        for shift in (-1, 1):
            moved = centred.clone()
            moved[:, i, j] += shift
            moved = moved.clamp(low, high)
            assert (objective(problem, moved, affine) >= value * (1 - 1e-5)).all()


def test_refitted_scales_satisfy_the_normal_equations() -> None:
    problem, centred, affine = rough(30)
    scales = least_squares_scales(problem, centred, affine.scale, iterations=300)
    rest = problem.weight - (centred.unflatten(-1, (4, 8)) * scales[..., None]).flatten(-2)
    gradient = problem.outputs @ rest @ problem.inputs
    along = (gradient.unflatten(-1, (4, 8)) * centred.unflatten(-1, (4, 8))).sum(-1)
    before = problem.outputs @ problem.weight @ problem.inputs
    assert along.abs().max() < 1e-3 * before.abs().max()


# ---- against brute force -----------------------------------------------------------------------


def test_small_problems_come_close_to_the_optimum() -> None:
    grid = IntegerGrid(2, None, symmetric=False)
    options = {"shrink_inputs": 0.0, "shrink_outputs": 0.0, "damping": 0.0}
    every = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * 8).view(-1, 2, 4)
    ratios = []
    for seed in range(24):
        weight, H, G = weights(seed, 2, 4), moment(seed + 1, 4), moment(seed + 2, 2)
        found = two_sided.solve(weight, grid, H, G, **options)
        affine = Affine(*(p.expand(len(every), -1, -1) for p in found.affine))
        best = damage(weight - grid.decode(every, affine).float(), H, G).min()
        ratios.append(float(damage(weight - decoded(grid, found), H, G) / best))
    # 65536 roundings each. The worst is a local optimum of a strongly coupled problem.
    assert min(ratios) >= 1 - 1e-5
    assert sorted(ratios)[12] < 1.1 and max(ratios) < 6


# ---- awkward input -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_batch_is_solved_as_its_members_alone(name: str, group_size: int | None, symmetric: bool) -> None:
    grid = IntegerGrid(3, group_size, symmetric)
    weight, H, G = weights(40, 2, 3, 24, 32), moment(41, 32, (2, 3)), moment(42, 24, (2, 3))
    together = SOLVERS[name].solve(weight, grid, H, G)
    assert together.codes.dtype == torch.uint8 and together.codes.shape == weight.shape
    assert together.affine.scale.shape == together.affine.zero_point.shape == (2, 3, 24, grid.groups(32))
    assert same(together, SOLVERS[name].solve(weight, grid, H, G))  # and twice the same
    for a, b in product(range(2), range(3)):
        alone = SOLVERS[name].solve(weight[a, b], grid, H[a, b], G[a, b])
        assert torch.equal(alone.codes, together.codes[a, b])
        assert torch.equal(alone.affine.scale, together.affine.scale[a, b])


@pytest.mark.parametrize("name", ["gptq", "two_sided"])
def test_dead_and_dependent_inputs(name: str) -> None:
    weight, H, G = weights(50, 8, 32), moment(51, 32, rank=6), moment(52, 8, rank=2)
    H[[3, 7]], H[:, [3, 7]], G[1], G[:, 1] = 0, 0, 0, 0
    rounded = SOLVERS[name].solve(weight, GRID, H, G)
    assert torch.isfinite(decoded(GRID, rounded)).all()
    assert damage(weight - decoded(GRID, rounded), H, G) < damage(weight - decoded(GRID, nearest.solve(weight, GRID)), H, G)


def test_damping_rises_until_a_factor_exists() -> None:
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1
    factor, used = inverse_factor(torch.stack([indefinite, torch.eye(2)]), 0.01)
    assert 1 < used < 2
    torch.testing.assert_close(factor[1], torch.eye(2) / 1.01**0.5)


@pytest.mark.parametrize("name", ["gptq", "two_sided"])
def test_curvature_of_nothing_and_missing_curvature(name: str) -> None:
    weight = weights(60, 8, 8)
    for H, G in ((None, None), (torch.zeros(8, 8), torch.zeros(8, 8)), (moment(61, 8), None)):
        rounded = SOLVERS[name].solve(weight, GRID, H, G)
        assert torch.isfinite(decoded(GRID, rounded)).all()
    assert same(SOLVERS[name].solve(weight, GRID), clip.solve(weight, GRID))
    nothing, alike = (SOLVERS[name].solve(weight, GRID, m, m) for m in (torch.zeros(8, 8), torch.eye(8)))
    assert same(nothing, alike), "channels that the sample never met are all alike"


@pytest.mark.parametrize("name", ["gptq", "two_sided"])
def test_nonsense_is_refused(name: str) -> None:
    weight, H = weights(70, 8, 8), moment(71, 8)
    with pytest.raises(ValueError, match="weight holds NaN"):
        SOLVERS[name].solve(weight.fill_diagonal_(float("nan")), GRID, H)
    with pytest.raises(ValueError, match="H holds NaN"):
        SOLVERS[name].solve(weights(70, 8, 8), GRID, H * float("inf"))
    with pytest.raises(ValueError, match="H has shape"):
        SOLVERS[name].solve(weights(70, 8, 16), GRID, H)


def test_shrinkage_keeps_the_diagonal() -> None:
    H = moment(80, 16)
    torch.testing.assert_close(shrink(H, 0.3).diagonal(), H.diagonal())
    torch.testing.assert_close(shrink(H, 1.0), torch.diag(H.diagonal()))


# ---- real weights ------------------------------------------------------------------------------


def test_order_of_the_solvers_on_real_weights() -> None:
    maps = pebble.block()
    for bits in (4, 3, 2):
        grid = IntegerGrid(bits, 64, symmetric=False)
        total = dict.fromkeys(SOLVERS, 0.0)
        for weight, H, G in maps.values():
            price = {
                name: float(damage(weight - decoded(grid, solver.solve(weight, grid, H, G)), H, G))
                for name, solver in SOLVERS.items()
            }
            assert price["two_sided"] < price["gptq"] < min(price["clip"], price["nearest"])
            total = {name: total[name] + price[name] for name in total}
        # Clipping looks at single inputs only, so on a single matrix it may lose; over a block it wins.
        assert total["two_sided"] < 0.75 * total["gptq"] < 0.5 * total["clip"] < 0.5 * total["nearest"]


@pytest.mark.parametrize(("solver", "shrinkage"), [("gptq", 0.02), ("two_sided", 0.05)])
def test_damping_rises_until_there_is_a_factor_and_is_told(solver: str, shrinkage: float) -> None:
    """A moment with an eigenvalue below zero, as rounding makes them, beside one that is fine."""
    good, odd = moment(0, 16), 2 * torch.ones(16, 16) - torch.eye(16)
    with dampings() as found:
        SOLVERS[solver].solve(weights(1, 2, 8, 16), GRID, torch.stack([good, odd]))
    usual, raised = most(found, 2)
    least = -torch.linalg.eigvalsh(shrink(odd, shrinkage))[0].item()
    assert usual == DAMPING and DAMPING < least < raised < 2 * least
    with dampings() as found:
        nearest.solve(weights(1, 2, 8, 16), GRID)
    assert most(found, 2) == [0.0, 0.0]
