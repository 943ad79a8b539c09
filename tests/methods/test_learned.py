"""Learned rounding: derivatives, limits where the answer is known, brute force, and an order on real weights."""

from itertools import product
from typing import Any

import pebble
import pytest
import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid import values
from assay.methods.grid.base import Affine, Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.table import TableGrid
from assay.methods.solve import adaround, admm, clip, gptq, learned, nearest, sandwich, sign_round, two_sided
from assay.methods.solve.basis import bases
from assay.methods.solve.curvature import damage
from assay.methods.solve.learned import around, begin, pose, puller
from assay.methods.solve.refine import Problem, objective
from assay.methods.solve.rounded import Rounded

LEARNED: dict[str, Any] = {"sign_round": sign_round, "adaround": adaround, "admm": admm}
GRIDS: dict[str, Grid] = {
    "int2": IntegerGrid(2, 8, symmetric=False),
    "int4": IntegerGrid(4, 8, symmetric=False),
    "sym3": IntegerGrid(3, 8, symmetric=True),
    "nf4": TableGrid(values.quantile_values(4), 8),  # lopsided, so scales may be negative
    "mxfp4": TableGrid(values.float_values(2, 1), 8, scale_format="e8m0"),
}


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, size: int, batch: tuple[int, ...] = ()) -> Tensor:
    """A correlated second moment [*batch, size, size]."""
    mixing = weights(seed, *batch, size, size) / size**0.5 + torch.eye(size)
    sample = weights(seed + 1000, *batch, 4 * size, size) @ mixing
    return sample.mT @ sample / sample.shape[-2]


def posed(seed: int, grid: Grid, rows: int = 16, columns: int = 32) -> Problem:
    return pose(weights(seed, 2, rows, columns), grid, moment(seed + 1, columns, (2,)), moment(seed + 2, rows, (2,)))


def decoded(grid: Grid, rounded: Rounded) -> Tensor:
    return grid.decode(rounded.codes, rounded.affine).float()


def price(problem: Problem, rounded: Rounded) -> Tensor:
    return damage(problem.weight - decoded(problem.grid, rounded), problem.inputs, problem.outputs)


def same(one: Rounded, other: Rounded) -> bool:
    return torch.equal(one.codes, other.codes) and all(map(torch.equal, one.affine, other.affine))


# ---- derivatives -------------------------------------------------------------------------------


def test_the_pull_is_minus_the_derivative_of_the_objective() -> None:
    problem = posed(0, GRIDS["int2"])
    levels = weights(5, 2, 16, 32).requires_grad_()
    price = damage(problem.weight - levels, problem.inputs, problem.outputs)
    price.sum().backward()
    assert levels.grad is not None
    gradient, value = puller(problem)(levels.detach())
    torch.testing.assert_close(gradient, -levels.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, price.detach())


def through(x: Tensor) -> Tensor:
    """Rounding with the derivative of the identity."""
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("symmetric", [False, True])
def test_range_slopes_are_those_of_straight_through_rounding(symmetric: bool) -> None:
    grid = IntegerGrid(3, 8, symmetric, scale_dtype=torch.float32)
    problem = posed(6, grid)
    base = grid.fit(problem.weight * 0.6)  # so that weights lie beyond both ends
    offset = torch.rand(2, 16, 32, generator=torch.Generator().manual_seed(7)) - 0.5
    top, bottom = (torch.ones(2, 16, 4, requires_grad=True) for _ in range(2))
    start, zero = base.scale.double(), base.zero_point.double()
    if symmetric:
        scale, origin = start * top, zero
    else:
        scale = start * ((grid.top - zero) * top + zero * bottom) / grid.top
        origin = through(zero * start * bottom / scale)
    each, middle = (p.repeat_interleave(8, -1) for p in (scale, origin))
    steps = through((problem.weight / each + offset).maximum(-middle).minimum(grid.top - middle))
    D = problem.weight - steps * each
    (problem.outputs.double() @ D @ problem.inputs.double() * D).sum().div(2).backward()

    wanted = problem.weight + offset * base.scale.repeat_interleave(8, -1)
    present = sign_round.Rounding(grid.snap(wanted, *grid.per_weight(base, 32)), base)
    torch.testing.assert_close(present.centred.double(), steps.detach())
    gradient, _ = puller(problem)(grid.level(present.centred, grid.per_weight(base, 32)[0]))
    up, down = sign_round.slopes(grid, problem.weight, wanted, present, gradient)
    assert top.grad is not None
    if symmetric:
        assert not down.any()
        torch.testing.assert_close(up * base.scale, -top.grad, rtol=1e-3, atol=1e-3)
        return
    assert bottom.grad is not None
    torch.testing.assert_close(up * base.scale * (grid.top - base.zero_point.float()), -top.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(down * base.scale * base.zero_point.float(), -bottom.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("learner", LEARNED)
def test_threads_and_rough_products_learn_the_same_in_any_number(learner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in large matrices: products in bf16 by pieces, steps by rows, on as many threads as there are."""
    monkeypatch.setattr(learned, "WORTH", 1)
    monkeypatch.setattr(sandwich, "LARGE", 1)
    monkeypatch.setattr(sandwich, "ROWS", 20)
    grid, weight, H, G = GRIDS["int2"], weights(20, 2, 48, 64), moment(21, 64, (2,)), moment(22, 48, (2,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(LEARNED[learner].solve(weight, grid, H, G, steps=30))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@pytest.mark.parametrize("name", GRIDS)
def test_compiled_offsets_move_as_they_are_defined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, problem = GRIDS[name], posed(23, GRIDS[name])
    affine, weight = grid.fit(problem.weight * 0.6), problem.weight  # so that weights lie beyond both ends
    width, gradient = weights(24, 2, 16, 32).abs(), weights(25, 2, 16, 32)
    offset = torch.rand(2, 16, 32, generator=torch.Generator().manual_seed(26)) - 0.5
    found = []
    for runs in (True, False):
        monkeypatch.setattr(compiled, "runs_on", lambda _, runs=runs: runs)
        own = offset.clone()
        present, levels = sign_round.rounding(grid, weight, width, own, affine)
        slopes = sign_round.move(grid, weight, width, own, present, gradient, 0.01)
        found.append((present.centred, levels, *slopes, own))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (found[0][-1] != offset).all()


@pytest.mark.parametrize("force", [0.0, 3.0])
def test_compiled_gates_move_as_they_are_defined(force: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates from end to end, beyond which they feel nothing."""
    shape = 2, 16, 32
    gradient, bottom, width = (weights(s, *shape) for s in (30, 31, 32))
    found = []
    for runs in (True, False):
        monkeypatch.setattr(compiled, "runs_on", lambda _, runs=runs: runs)
        state = adaround.State(3 * weights(33, *shape), weights(34, *shape), weights(35, *shape).square(), torch.zeros(shape))
        adaround.move(state, gradient, bottom, width.abs(), (0.1, 1.5), 7.5, force)
        found.append(state)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- where the answer is known -----------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_sign_rounding_without_steps_is_rounding_to_nearest(name: str) -> None:
    grid, weight = GRIDS[name], weights(10, 2, 16, 32)
    found = sign_round.solve(weight, grid, moment(11, 32, (2,)), moment(12, 16, (2,)), steps=0, polish=False)
    assert same(found, nearest.solve(weight, grid))


@pytest.mark.parametrize("name", GRIDS)
def test_ranges_shrunken_by_nothing_are_the_grid(name: str) -> None:
    base = GRIDS[name].fit(weights(13, 2, 16, 32))
    one = torch.ones_like(base.scale, dtype=torch.float32)
    assert all(map(torch.equal, sign_round.shrunken(GRIDS[name], base, one, one), base))


@pytest.mark.parametrize("learner", LEARNED)
def test_diagonal_curvature_leaves_nothing_to_learn_but_ranges(learner: str) -> None:
    grid, weight = GRIDS["int4"], weights(14, 2, 16, 32)
    H, G = (torch.diag_embed(torch.rand(2, n, generator=torch.Generator().manual_seed(n)) + 0.1) for n in (32, 16))
    options = {"ranges": False} if learner == "sign_round" else {}
    found = LEARNED[learner].solve(weight, grid, H, G, start="clip", polish=False, **options)
    assert same(found, clip.solve(weight, grid, pose(weight, grid, H, G).inputs))


def test_admm_need_not_turn_independent_outputs() -> None:
    grid = GRIDS["int2"]
    problem = pose(weights(15, 2, 16, 32), grid, moment(16, 32, (2,)), None)
    first = begin(problem, "clip")
    H, G = moment(16, 32, (2,)), torch.eye(16).expand(2, -1, -1)
    one, other = (admm.learn(problem, first, bases(H, outputs), 20, 0.06, 1.0) for outputs in (None, G))
    torch.testing.assert_close(objective(problem, *one), objective(problem, *other), rtol=1e-3, atol=0)
    assert (one.centred == other.centred).float().mean() > 0.99


def test_admm_loses_little_by_rough_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turned in bf16 like differences, whole weights would cost 6% and more."""
    problem, weight = posed(30, GRIDS["int4"], 128, 256), weights(30, 2, 128, 256)
    found = []
    for large in (1, 1 << 20):
        monkeypatch.setattr(sandwich, "LARGE", large)
        found.append(price(problem, admm.solve(weight, GRIDS["int4"], moment(31, 256, (2,)), moment(32, 128, (2,)))).sum())
    assert found[0] < 1.02 * found[1]


@pytest.mark.parametrize("name", GRIDS)
def test_the_steps_around_a_weight_are_neighbours_that_enclose_it(name: str) -> None:
    grid = GRIDS[name]
    problem = posed(17, grid)
    affine = grid.fit_clipped(problem.weight)
    scale, lower, upper = around(problem, affine)
    assert (lower * scale < upper * scale).all()
    _, low, high = grid.per_weight(affine, 32)
    ends = torch.stack([low * scale, high * scale])
    inside = (problem.weight >= ends.amin(0)) & (problem.weight <= ends.amax(0))
    slack = 0.05 * (upper - lower).abs() * scale.abs()  # levels are rounded to bf16, products are not
    assert ((lower * scale - slack <= problem.weight) & (problem.weight <= upper * scale + slack))[inside].all()
    assert 0 < (~inside).sum() < inside.sum()
    side = (upper - lower).sign()
    assert torch.equal(grid.beside(lower, side, low, high), upper)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_adaround_rounds_up_or_down(bits: int) -> None:
    grid = IntegerGrid(bits, 8, symmetric=False)
    problem = posed(18, grid)
    found = adaround.solve(problem.weight, grid, problem.inputs, problem.outputs, polish=False)
    scale, low, high = grid.per_weight(found.affine, 32)
    steps, floor = found.codes.float() + low, (problem.weight / scale).floor()
    inside = (floor >= low) & (floor < high)
    assert ((steps == floor) | (steps == floor + 1))[inside].all()
    assert ((steps - floor.clamp(low, high)).abs() <= 1).all()
    assert (steps != (problem.weight / scale).round().clamp(low, high)).any()  # it did move


# ---- better than ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("start", ["nearest", "clip"])
@pytest.mark.parametrize("learner", LEARNED)
def test_never_worse_than_its_start(learner: str, start: str, name: str) -> None:
    grid = GRIDS[name]
    for seed in (20, 21):
        problem = posed(seed, grid)
        before = objective(problem, *begin(problem, start))  # type: ignore[arg-type]
        given = problem.weight, grid, moment(seed + 1, 32, (2,)), moment(seed + 2, 16, (2,))
        for steps, polish in product((3, 60), (False, True)):
            found = price(problem, LEARNED[learner].solve(*given, start=start, steps=steps, polish=polish))
            assert (found <= before * (1 + 1e-5)).all()
        assert (found < before).all()


@pytest.mark.parametrize("learner", LEARNED)
def test_comes_within_five_percent_of_the_optimum_more_often_than_gptq(learner: str) -> None:
    # Independent rows, so that 4096 roundings a row are all there are.
    grid, count = IntegerGrid(2, None, symmetric=False), 60
    weight, H = weights(30, count, 4, 6), moment(31, 6, (count,))
    G = torch.eye(4).expand(count, -1, -1)
    every = torch.cartesian_prod(*[torch.arange(4.0)] * 6)

    def ratios(found: Rounded) -> Tensor:
        problem = pose(weight, grid, H, G)
        scale, low, _ = grid.per_weight(found.affine, 6)
        levels = grid.level(every + low[:, :, None], scale[:, :, None])
        D = weight[:, :, None] - levels
        best = ((D @ problem.inputs[:, None]) * D).sum(-1).amin(-1).sum(-1) / 2
        return price(problem, found) / best

    ours, theirs = ratios(LEARNED[learner].solve(weight, grid, H, G)), ratios(gptq.solve(weight, grid, H))
    assert ours.min() >= 1 - 1e-4
    assert (ours < 1.05).sum() > (theirs < 1.05).sum() + 5


def test_order_on_real_weights() -> None:
    grid = IntegerGrid(2, 64, symmetric=False)
    total: dict[str, float] = {}
    maps = pebble.block()
    for weight, H, G in (maps[name] for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")):
        problem = pose(weight, grid, H, G)
        for name, found in {
            "nearest": nearest.solve(weight, grid),
            "gptq": gptq.solve(weight, grid, H),
            "two_sided": two_sided.solve(weight, grid, H, G),
            "sign_round": sign_round.solve(weight, grid, H, G, steps=50),
            "adaround": adaround.solve(weight, grid, H, G),
            "admm": admm.solve(weight, grid, H, G),
        }.items():
            total[name] = total.get(name, 0) + float(price(problem, found))
    assert total["sign_round"] < 0.75 * total["gptq"] < total["gptq"] < total["nearest"]
    assert total["adaround"] < total["two_sided"]
    assert total["admm"] < 0.9 * total["two_sided"]


# ---- all alike ---------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNED)
def test_a_batch_is_solved_as_its_members_alone(learner: str) -> None:
    grid = GRIDS["int2"]
    weight, H, G = weights(40, 2, 3, 16, 32), moment(41, 32, (2, 3)), moment(42, 16, (2, 3))
    together = LEARNED[learner].solve(weight, grid, H, G, steps=30)
    assert together.codes.dtype == torch.uint8 and together.codes.shape == weight.shape
    assert together.affine.scale.shape == together.affine.zero_point.shape == (2, 3, 16, 4)
    assert same(together, LEARNED[learner].solve(weight, grid, H, G, steps=30))
    for a, b in product(range(2), range(3)):
        alone = LEARNED[learner].solve(weight[a, b], grid, H[a, b], G[a, b], steps=30)
        assert same(alone, Rounded(together.codes[a, b], Affine(*(p[a, b] for p in together.affine))))


@pytest.mark.parametrize("learner", LEARNED)
def test_the_number_of_threads_changes_nothing(learner: str) -> None:
    weight, H, G = weights(60, 1, 256, 256), moment(61, 256, (1,)), moment(62, 256, (1,))
    grid, before = IntegerGrid(2, 64, symmetric=False), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(LEARNED[learner].solve(weight, grid, H, G, steps=20))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


@pytest.mark.parametrize("learner", LEARNED)
def test_missing_and_broken_curvature(learner: str) -> None:
    grid, weight, H = GRIDS["int2"], weights(50, 8, 8), moment(51, 8)
    assert same(LEARNED[learner].solve(weight, grid), clip.solve(weight, grid))
    assert same(LEARNED[learner].solve(weight, grid, H), LEARNED[learner].solve(weight, grid, H, torch.eye(8)))
    nothing = LEARNED[learner].solve(weight, grid, torch.zeros(8, 8), torch.zeros(8, 8))
    assert torch.isfinite(decoded(grid, nothing)).all()
    with pytest.raises(ValueError, match="H holds NaN"):
        LEARNED[learner].solve(weight, grid, H * float("inf"))
    with pytest.raises(ValueError, match="G has shape"):
        LEARNED[learner].solve(weight, grid, H, H[:4])
