"""Every planner against brute force, and against the promises in its docstring."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from budget.tables import (
    LEVELS,
    cases,
    damage,
    decision,
    extremes,
    largest_step,
    least_bytes,
    least_damage,
    menus,
    nbytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.budget import planners
from assay.budget.menu import Decision, Option
from assay.budget.planners import integer, lagrange, uniform
from assay.model.errors import InputError

NEAR = 1 + 1e-9
quick = settings(max_examples=150)
few = settings(max_examples=60)
Case = tuple[list[Decision], int]


def test_every_planner_is_found_by_its_file_name() -> None:
    assert planners.names() == ["baq", "bisection", "dynamic", "evolution", "integer", "lagrange", "ranked", "uniform"]
    assert planners.get("lagrange") is lagrange
    with pytest.raises(InputError, match="did you mean lagrange"):
        planners.get("lagrang")


@pytest.mark.parametrize("name", planners.names())
@few
@given(case=cases(most=6))
def test_never_above_the_budget_nor_worse_than_uniform(name: str, case: Case) -> None:
    choice = planners.get(name).plan(*case)
    assert all(type(index) is int for index in choice)
    assert nbytes(case[0], choice) <= case[1]
    assert damage(case[0], choice) <= damage(case[0], uniform.plan(*case)) * NEAR


@pytest.mark.parametrize("name", planners.names())
@few
@given(case=cases())
def test_too_small_a_budget_is_refused_with_the_range(name: str, case: Case) -> None:
    low, high = extremes(case[0])
    with pytest.raises(InputError, match=f"{low} to {high}"):
        planners.get(name).plan(case[0], low - 1)
    assert nbytes(case[0], planners.get(name).plan(case[0], low)) == low


@pytest.mark.parametrize("name", planners.names())
@few
@given(decisions=menus())
def test_where_everything_fits_nothing_is_lost(name: str, decisions: list[Decision]) -> None:
    assert damage(decisions, planners.get(name).plan(decisions, extremes(decisions)[1])) == 0


@pytest.mark.parametrize("name", planners.names())
def test_an_empty_menu_has_an_empty_plan(name: str) -> None:
    assert planners.get(name).plan([], 0) == []


@pytest.mark.parametrize("biggest", [50, 10**9], ids=["many equal sums", "large"])
@few
@given(data=st.data())
def test_integer_equals_brute_force_and_proves_it(biggest: int, data: st.DataObject) -> None:
    decisions, budget = data.draw(cases(biggest=biggest))
    choice, bound = integer.solve(decisions, budget, 10)
    best = least_damage(decisions, budget)
    assert nbytes(decisions, choice) <= budget
    assert best <= damage(decisions, choice) * NEAR and damage(decisions, choice) <= best * NEAR
    assert bound <= best * NEAR
    assert lagrange.lower_bound(decisions, budget) <= bound * NEAR


@few
@given(case=cases(most=4), more=st.integers(0, 10**6))
def test_integer_is_monotone_in_the_budget(case: Case, more: int) -> None:
    smaller, larger = (damage(case[0], integer.plan(case[0], case[1] + extra)) for extra in (0, more))
    assert larger <= smaller * NEAR


@few
@given(case=cases(most=6))
def test_integer_without_time_still_answers(case: Case) -> None:
    choice, bound = integer.solve(*case, 0.0)
    assert choice == lagrange.plan(*case)
    assert bound <= damage(case[0], choice) * NEAR


@quick
@given(case=cases())
def test_lagrange_is_within_one_step_of_its_bound(case: Case) -> None:
    best, bound = least_damage(*case), lagrange.lower_bound(*case)
    found = damage(case[0], lagrange.plan(*case))
    assert 0 <= bound <= best * NEAR
    assert best <= found * NEAR
    assert found <= bound + largest_step(case[0])[1] * NEAR


@few
@given(case=cases(), more=st.integers(0, 10**6))
def test_the_lower_bound_falls_with_the_budget(case: Case, more: int) -> None:
    assert lagrange.lower_bound(case[0], case[1] + more) <= lagrange.lower_bound(*case) * NEAR


@quick
@given(decisions=menus(), share=st.floats(0, 1))
def test_planning_for_a_loss_keeps_it_within_one_step_of_the_fewest_bytes(decisions: list[Decision], share: float) -> None:
    bound = share * damage(decisions, [0] * len(decisions))
    choice = lagrange.plan_for_loss(decisions, bound)
    assert damage(decisions, choice) <= bound * NEAR
    assert nbytes(decisions, choice) <= least_bytes(decisions, bound) + largest_step(decisions)[0]


def test_planning_for_an_impossible_loss_is_refused() -> None:
    decisions = [decision(0, [1, 2], [0.5], LEVELS[:1], True)]
    assert lagrange.plan_for_loss(decisions, 0.0) == [1]
    assert lagrange.plan_for_loss(decisions, 0.5) == [0]
    for bound in (-1e-9, float("nan")):
        with pytest.raises(InputError, match="out of reach"):
            lagrange.plan_for_loss(decisions, bound)


def test_bytes_left_go_to_options_off_the_hull() -> None:
    options = (Option("int2-g64-asym", 10, 1.0), Option("int3-g64-asym", 20, 0.9), Option(None, 30, 0.0))
    decisions = [Decision("a", ("a",), 10, True, options)]
    assert [lagrange.plan(decisions, budget) for budget in (19, 20, 29, 30)] == [[0], [1], [1], [2]]


def test_bytes_are_not_spent_for_nothing() -> None:
    dead = Decision("a", ("a",), 10, True, (Option("int2-g64-asym", 10, 0.0), Option(None, 30, 0.0)))
    assert [planners.get(name).plan([dead], 30) for name in planners.names()] == [[0]] * len(planners.names())


def test_uniform_without_the_level_takes_the_next_larger() -> None:
    full = decision(0, [250, 500, 2000], [3.0, 1.0], ["int2-g64-asym", "int4-g64-asym"], True)
    lacking = decision(1, [250, 1000, 2000], [3.0, 0.5], ["int2-g64-asym", "int8-g64-asym"], True)
    kept = decision(2, [2000], [], [], True)
    assert uniform.plan([full, lacking, kept], 3999) == [1, 1, 0]
    assert uniform.plan([full, lacking, kept], 3499) == [0, 0, 0]


def test_uniform_keeps_what_is_outside_the_blocks_where_that_fits() -> None:
    inside, outside = (decision(i, [500, 2000], [1.0], ["int4-g64-asym"], i == 0) for i in range(2))
    assert uniform.plan([inside, outside], 2500) == [0, 1]
    assert uniform.plan([inside, outside], 2499) == [0, 0]


@few
@given(case=cases(), data=st.data())
def test_what_a_uniform_plan_comes_to_is_among_the_likely_levels_of_rough_damages(case: Case, data: st.DataObject) -> None:
    decisions, budget = case
    factors = {level: data.draw(st.floats(1, 0.999 * uniform.LIKELY)) for level in LEVELS}
    options = [[replace(o, damage=o.damage * factors.get(o.level, 1)) for o in d.options] for d in decisions]
    rough = [replace(d, options=tuple(found)) for d, found in zip(decisions, options, strict=True)]
    chosen = {d.options[c].level for d, c in zip(decisions, uniform.plan(decisions, budget), strict=True)}
    assert chosen - {None} <= uniform.likely(rough, budget)


def test_the_order_of_decisions_changes_neither_bytes_nor_damage() -> None:
    chance = random.Random(0)
    decisions = random_menu(chance, 200, 8)
    budget = sum(extremes(decisions)) // 2
    shuffled = chance.sample(decisions, len(decisions))
    for planner in (lagrange, uniform):
        one, other = (planner.plan(d, budget) for d in (decisions, shuffled))
        assert nbytes(decisions, one) == nbytes(shuffled, other)
        assert damage(decisions, one) == pytest.approx(damage(shuffled, other))


def random_menu(chance: random.Random, count: int, width: int) -> list[Decision]:
    """Decisions of `width` options each, without hypothesis's overhead."""
    return [
        decision(
            i,
            chance.sample(range(10**6), width),
            [chance.random() + 1e-9 for _ in range(width - 1)],
            [f"int{2 + k % 7}-g{32 * (1 + k // 7)}-sym" for k in range(width - 1)],
            True,
        )
        for i in range(count)
    ]


def test_a_hundred_thousand_decisions() -> None:
    decisions = random_menu(random.Random(0), 1000, 20) * 100
    budget = sum(extremes(decisions)) // 2
    choice = lagrange.plan(decisions, budget)
    assert nbytes(decisions, choice) <= budget
    bound = lagrange.lower_bound(decisions, budget)
    assert bound <= damage(decisions, choice) <= bound + largest_step(decisions)[1]
