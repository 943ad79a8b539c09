"""Sizes as people write them, and budgets as limits in bytes."""

from __future__ import annotations

import math

import pytest
from budget.tables import decision, extremes, menus
from hypothesis import given
from hypothesis import strategies as st

from assay.budget.menu import Decision
from assay.budget.size import Budget, bits_to_bytes, parse_size
from assay.model.errors import InputError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("3.5GB", 3_500_000_000),
        ("22GiB", 22 * 2**30),
        ("1.5g", 1_500_000_000),
        ("900MB", 900_000_000),
        ("1G", 10**9),
        (" 2 kib ", 2048),
        (".5k", 500),
        ("7", 7),
        (7, 7),
        ("7b", 7),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(st.integers(1, 10**6))
def test_decimals_lose_no_byte(tenths: int) -> None:
    assert parse_size(f"{tenths // 10}.{tenths % 10}GB") == tenths * 10**8


@pytest.mark.parametrize("text", ["3.5XB", "GB", "", "1.2.3GB", "nan", "inf", "1e9", "3,5GB", "3.5 G B"])
def test_sizes_that_are_none_name_the_units(text: str) -> None:
    with pytest.raises(InputError, match=r"GB or G is 10\^9 bytes, GiB is 2\^30"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", 0, "-1GB", -5, "0.0GB", "0.1", "-0"])
def test_sizes_of_nothing(text: str | int) -> None:
    with pytest.raises(InputError, match="must be one byte or more"):
        parse_size(text)


@given(nbytes=st.integers(1, 10**12), count=st.integers(1, 10**12))
def test_the_bits_of_a_plan_are_a_budget_that_holds_it_and_no_more(nbytes: int, count: int) -> None:
    assert bits_to_bytes(8 * nbytes / count, count) == nbytes


def test_bits_are_taken_as_written() -> None:
    assert bits_to_bytes(4.1, 80) == 41
    assert bits_to_bytes(3, 3) == 1
    assert bits_to_bytes(1e-7, 8 * 10**7) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "got none"),
        ({"size": "1GB", "bits": 4}, "--size and --bits"),
        ({"bits": 4, "max_loss": 0.1}, "--bits and --max-loss"),
        ({"bits": 0}, "--bits 0 must"),
        ({"bits": math.nan}, "--bits nan must"),
        ({"bits": math.inf}, "--bits inf must"),
        ({"bits": "four"}, "--bits four must"),
        ({"bits": True}, "--bits True must"),
        ({"max_loss": -0.1}, "--max-loss -0.1 must"),
        ({"size": "1 parsec"}, "parsec"),
    ],
)
def test_exactly_one_budget_that_makes_sense(given: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Budget(**given)  # type: ignore[arg-type]


def two() -> list[Decision]:
    inside = decision(0, [300, 500, 2000], [1.0, 0.1], ["int2-g64-asym", "int4-g64-asym"], True)
    return [inside, decision(1, [400, 1600], [1.0], ["int4-g64-asym"], False)]


def test_bits_count_inside_the_blocks_and_the_rest_as_stored() -> None:
    assert Budget(bits=4).limit_for(two(), 10**9) == 500 + 1600
    assert Budget(bits=100).limit_for(two(), 0) == 2000 + 1600
    with pytest.raises(InputError, match=r"--bits 2\.39 is out of reach; .* 2\.400 to 16\.000"):
        Budget(bits=2.39).limit_for(two(), 0)


def test_size_counts_the_whole_files() -> None:
    assert Budget(size=5000).limit_for(two(), 1000) == 4000
    assert Budget(size=1700).limit_for(two(), 1000) == 700
    with pytest.raises(InputError, match="--size 1699 is out of reach"):
        Budget(size=1699).limit_for(two(), 1000)


@given(menus(), st.floats(0.01, 64))
def test_a_limit_is_within_reach_or_refused(decisions: list[Decision], bits: float) -> None:
    low, high = extremes(decisions)
    try:
        assert low <= Budget(bits=bits).limit_for(decisions, 0) <= high
    except InputError as error:
        assert "out of reach" in str(error)
