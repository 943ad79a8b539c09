"""Budgets of time: the table of speeds, plans within it, and torch's kernels where it has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save, text_file

import assay
from assay.budget import offers
from assay.budget.menu import Decision, Option
from assay.budget.planners import lagrange
from assay.budget.speed import Speeds, benchmark
from assay.measure.profile import Profile
from assay.model.errors import InputError

SHAPE = (64, 64)


def table(**seconds: float) -> Speeds:
    return Speeds({(level.replace("_", "-"), SHAPE): s for level, s in seconds.items()}, "a machine")


def menu(count: int) -> list[Decision]:
    options = (Option("int3-g64-asym", 100, 9.0), Option("int4-g64-asym", 130, 3.0), Option("int8-channel-sym", 200, 1.0),
               Option(None, 400, 0.0))  # fmt: skip
    return [Decision(f"s{i}", (f"s{i}",), 4096, True, options) for i in range(count)]


def test_slow_levels_are_not_chosen_however_small_they_are() -> None:
    speeds = table(keep=4e-6, int4_g64_asym=1e-6, int8_channel_sym=2e-6)
    shapes = {f"s{i}": SHAPE for i in range(4)}
    picked = speeds.plan(menu(4), shapes, 0.006, lagrange.plan)
    assert sorted(picked) == [1, 1, 2, 2]
    levels = {f"s{i}": menu(4)[i].options[c].level for i, c in enumerate(picked)}
    assert speeds.milliseconds(levels, shapes) == pytest.approx(0.006)
    assert speeds.plan(menu(4), shapes, 0.016, lagrange.plan) == [3] * 4


def test_what_is_too_fast_is_refused_with_the_range() -> None:
    speeds = table(keep=4e-6, int4_g64_asym=1e-6)
    with pytest.raises(InputError, match=r"0\.001 ms a token are out of reach; .* 0\.002 to 0\.008 ms"):
        speeds.plan(menu(2), {f"s{i}": SHAPE for i in range(2)}, 0.001, lagrange.plan)
    with pytest.raises(InputError, match="lacks matrices of 32 x 32"):
        speeds.plan(menu(1), {"s0": (32, 32)}, 1.0, lagrange.plan)


def test_a_table_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    speeds = table(keep=4e-6, int4_g64_asym=1.25e-6)
    speeds.save(tmp_path / "s.json")
    assert Speeds.load(tmp_path / "s.json") == speeds
    (tmp_path / "s.json").write_text('{"rows": 3, "machine": ""}')
    with pytest.raises(InputError, match="not a table of speeds"):
        Speeds.load(tmp_path / "s.json")


def test_plans_keep_to_a_rate_that_this_machine_was_measured_at(tmp_path: Path) -> None:
    save("llama", tmp_path / "m", hidden_size=256, intermediate_size=512)
    assay.profile(tmp_path / "m", tmp_path / "p", calibration=text_file(tmp_path), tokens=512, window=32)
    speeds = assay.benchmark(tmp_path / "p", tmp_path / "s.json")
    assert ("int4-g64-asym", (512, 256)) in speeds.seconds
    assert ("int3-g64-asym", (512, 256)) not in speeds.seconds
    shapes = {r.name: r.shape for r in offers.rows_of(Profile.open(tmp_path / "p"))}
    slowest = speeds.milliseconds(dict.fromkeys(shapes), shapes)
    plan = assay.plan(tmp_path / "p", latency=0.8 * slowest, speeds=tmp_path / "s.json", engine="vllm")
    assert speeds.milliseconds({n: c.level for n, c in plan.choices.items()}, shapes) <= 0.8 * slowest
    assert 0 < plan.predicted <= plan.uniform["predicted"]
    with pytest.raises(InputError, match="needs --speeds"):
        assay.plan(tmp_path / "p", latency=1.0)


def test_an_embedding_costs_no_product() -> None:
    assert benchmark([], []).seconds == {}
