"""Menus: what is decided together, what is left out, what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.budget.menu import Decision, Option, SiteRow, build
from assay.budget.planners import lagrange
from assay.model.errors import InputError
from assay.model.level import Level

FUSED = [frozenset({"attn.q", "attn.k", "attn.v"}), frozenset({"mlp.gate", "mlp.up"})]
LEVELS = [Level(4), Level(2), Level(8)]
PRICES = {"int2-g64-asym": 1.0, "int4-g64-asym": 0.1, "int8-g64-asym": 0.001}


def row(name: str, role: str = "attn.o", block: int | None = 0, stored: int = 8192) -> SiteRow:
    return SiteRow(name, role, block, (64, 64), stored, 2)


def menu(
    rows: Sequence[SiteRow],
    prices: Mapping[str, Mapping[str, float]] | None = None,
    levels: Callable[[SiteRow], list[Level]] = lambda row: LEVELS,
    fused: Sequence[frozenset[str]] = tuple(FUSED),
    outside: bool = False,
    keep: Sequence[str] = (),
) -> list[Decision]:
    prices = {r.name: PRICES for r in rows} if prices is None else prices
    return build(rows, prices, levels, fused, outside, keep)


def test_options_rise_in_bytes_fall_in_damage_and_end_with_keeping() -> None:
    (decision,) = menu([row("a.weight")])
    assert [o.level for o in decision.options] == ["int2-g64-asym", "int4-g64-asym", "int8-g64-asym", None]
    assert [o.nbytes for o in decision.options[:-1]] == [Level(b).nbytes(64, 64) for b in (2, 4, 8)]
    assert decision.options[-1] == Option(None, 8192, 0.0)
    assert (decision.count, decision.inside) == (4096, True)


@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(100, 10_000))
def test_whatever_the_prices_no_option_is_dominated(damages: list[float], stored: int) -> None:
    prices = {"a": dict(zip(PRICES, damages, strict=True))}
    *smaller, last = menu([row("a", stored=stored)], prices)[0].options
    assert last == Option(None, stored, 0.0)
    assert [o.nbytes for o in smaller] == sorted({o.nbytes for o in smaller})
    assert [o.damage for o in smaller] == sorted({o.damage for o in smaller}, reverse=True)
    assert all(o.nbytes < stored for o in smaller)


def test_keeping_stays_possible_where_a_level_costs_nothing() -> None:
    (decision,) = menu([row("a")], {"a": dict.fromkeys(PRICES, 0.0)})
    assert decision.options == (
        Option("int2-g64-asym", Level(2).nbytes(64, 64), 0.0),
        Option(None, 8192, 0.0),
    )


def test_a_named_level_stays_where_a_smaller_one_loses_less_and_only_at_its_site() -> None:
    prices = dict.fromkeys("ab", PRICES | {"int4-g64-asym": 2.0})
    named = {"a": Level(4)}
    own, other = build([row("a"), row("b")], prices, lambda r: LEVELS, [], False, nbytes=Level.nbytes, named=named)
    assert [o.level for o in own.options] == ["int2-g64-asym", "int4-g64-asym", "int8-g64-asym", None]
    assert [o.level for o in other.options] == ["int2-g64-asym", "int8-g64-asym", None]
    assert lagrange.plan([own], Level(4).nbytes(64, 64)) == [0], "no planner takes what loses more"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_levels_without_a_price_are_left_out(bad: float) -> None:
    for prices in (
        {"a": PRICES | {"int2-g64-asym": bad}},
        {"a": {k: v for k, v in PRICES.items() if "int2" not in k}},
    ):
        assert [o.level for o in menu([row("a")], prices)[0].options] == [
            "int4-g64-asym",
            "int8-g64-asym",
            None,
        ]
    assert [o.level for o in menu([row("a")], {})[0].options] == [None]


def test_fused_siblings_are_one_decision_per_parent() -> None:
    names = [
        ("self.q_proj", "attn.q"),
        ("self.k_proj", "attn.k"),
        ("self.o_proj", "attn.o"),
        ("cross.q_proj", "attn.q"),
    ]
    rows = [row(f"layers.{b}.{n}.weight", role, b) for b in range(2) for n, role in names]
    decisions = menu(rows)
    assert [len(d.sites) for d in decisions] == [2, 1, 1] * 2
    both = decisions[0]
    assert both.sites == ("layers.0.self.q_proj.weight", "layers.0.self.k_proj.weight")
    assert (both.count, both.options[-1].nbytes, both.options[0].damage) == (2 * 4096, 2 * 8192, 2.0)


def test_all_experts_of_a_block_are_one_decision_where_anything_is_fused() -> None:
    rows = [
        replace(row(f"layers.{b}.mlp.experts.{e}.{n}_proj.weight", f"mlp.{n}", b), expert=e)
        for b in range(2)
        for e in range(3)
        for n in ("gate", "up", "down")
    ]
    rows.append(row("layers.0.mlp.shared_expert.gate_proj.weight", "mlp.gate"))
    assert sorted(len(d.sites) for d in menu(rows)) == [1, 9, 9]
    assert sorted(len(d.sites) for d in menu(rows, fused=())) == [1] * 19


def test_siblings_share_only_the_levels_that_all_of_them_have() -> None:
    rows = [row("m.q", "attn.q"), row("m.k", "attn.k")]
    (decision,) = menu(rows, levels=lambda r: LEVELS if r.role == "attn.q" else LEVELS[:1])
    assert [o.level for o in decision.options] == ["int4-g64-asym", None]


def test_sites_outside_the_blocks_are_kept_unless_asked_for() -> None:
    rows = [row("lm_head.weight", "head", None), row("x.weight")]
    assert [len(d.options) for d in menu(rows)] == [1, 4]
    assert [(len(d.options), d.inside) for d in menu(rows, outside=True)] == [(4, False), (4, True)]


@pytest.mark.parametrize("pattern", ["l.0.q_proj", "l.0.q_proj.weight", "*.q_proj", "*q_*"])
def test_keep_takes_patterns_and_keeps_fused_siblings_too(pattern: str) -> None:
    rows = [row("l.0.q_proj.weight", "attn.q"), row("l.0.k_proj.weight", "attn.k"), row("l.0.o_proj.weight")]
    assert [len(d.options) for d in menu(rows, keep=[pattern])] == [1, 4]


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--keep l\.0\.p_proj matches nothing; near it: l\.0\.q_proj\.weight"):
        menu([row("l.0.q_proj.weight"), row("other.weight")], keep=["l.0.p_proj"])
    with pytest.raises(InputError, match="near it: q"):
        menu([row("q")], keep=["zzzzzzzz"])
