"""What is special about each planner: exact where it says so, and its order, its closed form or its search as promised."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from budget.tables import LEVELS, cases, damage, decision, every, extremes, least_damage, menus, nbytes
from budget.test_planners import NEAR, Case, few, random_menu
from hypothesis import given
from hypothesis import strategies as st

from assay.budget.menu import Decision, Option
from assay.budget.planners import baq, bisection, dynamic, evolution, integer, lagrange, ranked
from assay.budget.planners.evolution import Parent, Stage, evolve
from assay.budget.table import Table
from assay.model.errors import InputError

WHOLE = (Stage(1, 1.0),)


@few
@given(case=cases(biggest=2000))
def test_dynamic_equals_brute_force_where_its_grid_is_exact(case: Case) -> None:
    assert damage(case[0], dynamic.plan(*case)) <= least_damage(*case) * NEAR


@few
@given(case=cases(most=6), cells=st.integers(1, 40))
def test_dynamic_on_a_coarse_grid_keeps_the_budget_and_its_start(case: Case, cells: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "CELLS", cells)
        choice = dynamic.plan(*case)
    assert nbytes(case[0], choice) <= case[1]
    assert damage(case[0], choice) <= damage(case[0], lagrange.plan(*case)) * NEAR


def test_dynamic_finds_what_a_hull_misses() -> None:
    """Three steps of 6 bytes fit in 18, but the one that gains most per byte takes 10."""
    options = (Option("int2-g64-asym", 0, 5.0), Option("int3-g64-asym", 6, 2.1), Option("int4-g64-asym", 10, 0.0))
    decisions = [Decision(str(i), (str(i),), 10, True, options) for i in range(3)]
    decisions.append(Decision("large", ("large",), 10, True, (Option("int2-g64-asym", 0, 0.3), Option(None, 100, 0.0))))
    assert damage(decisions, dynamic.plan(decisions, 18)) == pytest.approx(least_damage(decisions, 18))
    assert damage(decisions, lagrange.plan(decisions, 18)) > least_damage(decisions, 18) + 0.5


@few
@given(case=cases(most=6), data=st.data())
def test_a_ranking_is_kept(case: Case, data: st.DataObject) -> None:
    """Promoted is a prefix of the ranking: no decision at the high level comes after one that stayed and would change."""
    decisions, budget = case
    table = Table.of(decisions)
    low, high = np.zeros_like(table.count), table.count - 1
    scores = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(decisions), max_size=len(decisions))))
    choice = ranked.promote(table, low, high, scores, budget)
    assert nbytes(decisions, choice.tolist()) <= budget
    promoted, stayed = (scores[(choice == side) & (low < high)] for side in (high, low))
    assert min(promoted, default=math.inf) >= max(stayed, default=-math.inf)
    following = [i for i in np.argsort(-scores, kind="stable") if choice[i] == low[i] < high[i]]
    if following:
        cost = table.nbytes[following[0], high[following[0]]] - table.nbytes[following[0], 0]
        assert nbytes(decisions, choice.tolist()) + cost > budget, "the prefix could be longer"


def test_the_right_ranking_beats_its_reverse() -> None:
    decisions = [decision(i, [2, 4, 16], [2.0**i, 2.0**i / 16], LEVELS[:2], True) for i in range(8)]
    budget = 8 * 3
    right, wrong = (damage(decisions, ranked.by_scores(decisions, s, budget)) for s in (range(8), range(8, 0, -1)))
    assert right < wrong / 4
    assert right == damage(decisions, ranked.plan(decisions, budget)), "damage saved per byte ranks them the same"


@few
@given(decisions=menus(most=6), share=st.floats(0, 1))
def test_bisection_holds_the_floor_and_asks_seldom(decisions: list[Decision], share: float) -> None:
    floor = share * damage(decisions, [0] * len(decisions))
    asked: list[list[int]] = []

    def holds(choice: list[int]) -> bool:
        asked.append(choice)
        return damage(decisions, choice) <= floor

    choice = bisection.to_floor(decisions, holds)
    assert choice in asked and holds(choice)
    thresholds = len({o.damage / d.count for d in decisions for o in d.options})
    assert len(asked) - 1 <= math.ceil(math.log2(thresholds + 1)) + 1
    cheaper = [c for c in (bisection.plan_for_loss(decisions, floor * x) for x in (1.0, 0.5)) if c]
    assert nbytes(decisions, cheaper[0]) <= nbytes(decisions, cheaper[-1]), "a lower floor needs no more bytes"


def test_bisection_refuses_a_floor_out_of_reach() -> None:
    with pytest.raises(InputError, match="out of reach"):
        bisection.to_floor([decision(0, [1, 2], [0.5], LEVELS[:1], True)], lambda choice: False)


def ladder(cost: list[float], step: float) -> list[Decision]:
    """Options of damage cost · 4^-bits a weight, in steps of so many bits; 32,000 weights each."""
    found = []
    for i, c in enumerate(cost):
        bits = np.arange(1, 8 + step / 2, step)
        lossy = [Option(f"l{b}", round(4000 * b), 32_000 * c * 4.0**-b) for b in bits]
        found.append(Decision(str(i), (str(i),), 32_000, True, (*lossy, Option(None, 64_000, 0.0))))
    return found


def test_the_closed_form_is_approached_from_above_as_levels_get_finer() -> None:
    cost = [10 ** random.Random(i).uniform(-9, -6) for i in range(12)]
    weights, ends = np.full(12, 32_000.0), (np.full(12, 1.0), np.full(12, 8.0))
    bits = baq.closed_form(np.array(cost), weights, *ends, 12 * 32_000 * 3.25)
    assert weights @ bits == pytest.approx(12 * 32_000 * 3.25)
    least = float(weights @ (np.array(cost) * 4.0**-bits))
    reached = {}
    for step in (1.0, 0.5, 0.25, 0.125):
        decisions = ladder(cost, step)
        budget = int(12 * 32_000 * 3.25 / 8)
        reached[step] = [damage(decisions, p.plan(decisions, budget)) / least for p in (dynamic, baq)]
        assert 1 <= reached[step][0] <= reached[step][1] * NEAR
    assert [r[0] for r in reached.values()] == sorted((r[0] for r in reached.values()), reverse=True)
    assert max(reached[0.125]) < 1.01 < 1.03 < min(reached[1.0])


@few
@given(data=st.data(), size=st.integers(2, 6))
def test_no_exchange_of_bits_improves_the_closed_form(data: st.DataObject, size: int) -> None:
    chance = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    cost, weights = 10 ** chance.uniform(-6, 3, size), chance.uniform(1, 100, size)
    low, high = chance.uniform(0, 2, size), chance.uniform(3, 8, size)
    total = float(weights @ (low + chance.uniform() * (high - low)))
    bits = baq.closed_form(cost, weights, low, high, total)
    assert weights @ bits == pytest.approx(total)
    assert (bits >= low - 1e-9).all() and (bits <= high + 1e-9).all()
    best = weights @ (cost * 4.0**-bits)
    for give, take in itertools.permutations(range(size), 2):
        moved = min(0.01, (bits[give] - low[give]) * weights[give], (high[take] - bits[take]) * weights[take])
        other = bits.copy()
        other[give] -= moved / weights[give]
        other[take] += moved / weights[take]
        assert weights @ (cost * 4.0**-other) >= best * (1 - 1e-9)


def test_on_equal_sizes_the_gain_is_geometric_over_arithmetic_mean() -> None:
    """BAQ's own prediction, for costs near enough that no bound is met."""
    cost = np.array([1.0, 3.0, 0.5, 2.0, 8.0])
    bits = baq.closed_form(cost, np.ones(5), np.zeros(5), np.full(5, 16.0), 15.0)
    gain = (cost * 4.0**-bits).mean() / (cost * 4.0**-3).mean()
    assert gain == pytest.approx(np.exp(np.log(cost).mean()) / cost.mean())


def planted(count: int, seed: int) -> tuple[list[Decision], int, Callable[[tuple[int, ...]], float]]:
    """Decisions whose errors add up before they are squared, in three sums; what each does alone is all that damage knows."""
    chance = np.random.default_rng(seed)
    mixed = chance.normal(size=(3, count)) * np.array([[1.0], [0.4], [0.4]])
    alone = np.square(mixed).sum(0)
    shares = (1.0, 0.35, 0.0)
    decisions = [
        Decision(str(i), (str(i),), 10, True, tuple(
            Option(level, 2 + k, float(alone[i] * shares[k] ** 2)) for k, level in enumerate((*LEVELS[:2], None))
        ))
        for i in range(count)
    ]  # fmt: skip
    return decisions, 5 * count // 2, lambda choice: float(np.square(mixed @ np.array([shares[c] for c in choice])).sum())


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_the_planted_optimum_that_additive_planners_miss(seed: int) -> None:
    decisions, budget, loss = planted(9, seed)
    best = min(loss(c) for c in every(decisions) if nbytes(decisions, c) <= budget)
    start = tuple(lagrange.plan(decisions, budget))
    search = evolve(decisions, budget, lambda cs, share, draw: [loss(c) for c in cs], Parent(start, loss(start), 0), 0, 32, WHOLE)
    found = list(itertools.islice(search, 60))
    assert found[-1].loss == loss(found[-1].choice) == pytest.approx(best)
    assert all(nbytes(decisions, p.choice) <= budget for p in found)
    losses = [loss(start), *(p.loss for p in found)]
    assert losses == sorted(losses, reverse=True)
    for planner in (lagrange, dynamic, ranked, bisection, baq):
        assert loss(tuple(planner.plan(decisions, budget))) > 1.05 * best


def test_the_card_s_example_of_four_gains() -> None:
    """Two of the errors +0.2, +0.2, -0.25, -0.3 must be taken: squares choose the first two, the product a mixed pair."""
    errors = [0.2, 0.2, -0.25, -0.3]
    pair = [(Option("int2-g64-asym", 1, e * e), Option(None, 2, 0.0)) for e in errors]
    decisions = [Decision(str(i), (str(i),), 10, True, options) for i, options in enumerate(pair)]
    assert dynamic.plan(decisions, 6) == [0, 0, 1, 1]

    def loss(choice: tuple[int, ...]) -> float:
        return (math.prod(1 + e * (c == 0) for e, c in zip(errors, choice, strict=True)) - 1) ** 2

    start = tuple(lagrange.plan(decisions, 6))
    search = evolve(decisions, 6, lambda cs, share, draw: [loss(c) for c in cs], Parent(start, loss(start), 0), 0, 8, WHOLE)
    assert sorted(errors[i] for i, c in enumerate(list(itertools.islice(search, 10))[-1].choice) if c == 0) == [-0.25, 0.2]


def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not() -> None:
    decisions, budget, loss = planted(9, 5)

    def fitness(choices, share, draw):
        noise = np.random.default_rng(draw).normal(0, 1e-3 / share, len(choices)) if share < 1 else np.zeros(len(choices))
        return [loss(c) + x for c, x in zip(choices, noise, strict=True)]

    stages = (Stage(8, 0.1), Stage(1, 1.0))
    start = tuple(lagrange.plan(decisions, budget))
    whole = list(itertools.islice(evolve(decisions, budget, fitness, Parent(start, 1.0, 0), 3, 24, stages), 12))
    again = list(itertools.islice(evolve(decisions, budget, fitness, whole[5], 3, 24, stages), 6))
    assert whole[6:] == again


def test_stages_measure_fewer_plans_on_more_text() -> None:
    decisions = random_menu(random.Random(0), 30, 6)
    budget = sum(extremes(decisions)) // 2
    seen: list[tuple[int, float]] = []

    def fitness(choices, share, draw):
        assert len(set(choices)) == len(choices)
        assert all(nbytes(decisions, c) <= budget for c in choices)
        seen.append((len(choices), share))
        return [damage(decisions, c) for c in choices]

    start = tuple(lagrange.plan(decisions, budget))
    next(evolve(decisions, budget, fitness, Parent(start, 1e9, 0), 0))
    assert seen[:2] == [(128, 1 / 64), (17, 1 / 8)], "the parent joins the stage before the last"
    assert all(count <= 4 and share == 1.0 for count, share in seen[2:])


@few
@given(case=cases(most=5))
def test_evolution_without_a_model_is_no_worse_than_where_it_starts(case: Case) -> None:
    assert damage(case[0], evolution.plan(*case)) <= damage(case[0], lagrange.plan(*case)) * NEAR


def test_integer_leaves_the_standard_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints about some menus whatever its options say; a command that promises one JSON document must not."""
    for seed in range(8):
        decisions = random_menu(random.Random(seed), 100, 20)
        integer.plan(decisions, sum(extremes(decisions)) // 2)
    assert capfd.readouterr().out == ""
