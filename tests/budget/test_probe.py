"""What a profile measures of the running model: how deep a block lies changes what its damage costs, and what solvers leave."""

from __future__ import annotations

import pytest
import torch

import assay
from assay.budget.forecast import Forecast
from assay.budget.probe import nearest, probed_level, statistics
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel, read_weight
from assay.methods import base
from assay.model.level import Level
from assay.model.sites import Site
from assay.prove.variants import mean_kl
from assay.run import open_model

BITS = 3


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of the built-in model."""
    return assay.profile("builtin", tmp_path_factory.mktemp("probe") / "p", tokens=4096, window=128, methods=("two_sided",))


@pytest.fixture(scope="module")
def model() -> StreamedModel:
    return StreamedModel(open_model("builtin"))


def inside(model: StreamedModel) -> list[Site]:
    return [site for site in model.anatomy.sites.values() if site.block is not None]


def test_the_first_blocks_excess_explains_what_rounding_it_adds(profile: Profile, model: StreamedModel) -> None:
    count = len(model.blocks)
    held, rounded = torch.tensor(profile.index["held_out"]), nearest(lambda site: probed_level(site.shape[1], BITS))
    whole, rest = mean_kl(model, held, [["r"] * count, [None] + ["r"] * (count - 1)], lambda block, key: rounded)
    prices = {s: profile.prices[s.name][probed_level(s.shape[1], BITS).name]["nearest"] for s in inside(model)}
    first = sum(price for site, price in prices.items() if site.block == 0)
    others = sum(prices.values()) - first
    excess = profile.index["first"]
    assert abs(excess - 1) > 0.05
    assert whole - rest == pytest.approx(excess * first * rest / others, rel=2e-3)
    assert [d for d, _ in profile.index["probes"]][1] == pytest.approx(excess * first + others)
    assert Forecast.from_index(profile.index).excess(0) == excess
    assert Forecast.from_index(profile.index).excess(1) == Forecast.from_index(profile.index).excess(None) == 1


def test_a_solvers_damage_in_the_first_block_is_that_of_its_own_rehearsal(profile: Profile, model: StreamedModel) -> None:
    """By the middle block's alone it would be told more than a tenth too low."""
    level, method, forecast = Level.parse("int2-g64-asym"), base.get("two_sided")(), Forecast.from_index(profile.index)
    curvatures, left, priced = profile.curvatures(0), 0.0, 0.0
    for site in {s.shape: s for s in inside(model) if s.block == 0 and s.shape[1] <= 2 * 256}.values():  # one of each shape
        weight, curvature = read_weight(model, site), curvatures[site.name]
        packed = method.encode(weight[None], level, torch.bfloat16, statistics(method, [curvature]))[0]
        left += curvature.damage(packed.decode().float() - weight)
        priced += profile.prices[site.name][level.name][method.prices]
    middle = len(model.blocks) // 2
    told = [forecast.damage("two_sided", level, priced, block) for block in (0, middle)]
    assert told[0] == pytest.approx(left * forecast.excess(0), rel=1e-3)
    assert told[1] < 0.9 * left


def test_between_rehearsed_blocks_ratios_change_by_equal_factors() -> None:
    forecast = Forecast({"m": {0: {2: 1.6, 4: 1.0}, 4: {2: 0.1, 4: 1.0}, 9: {2: 0.2, 4: 3.0}}}, [])
    level = Level.parse("int2-g64-asym")
    found = [forecast.damage("m", level, 10.0, block) for block in (0, 1, 2, 3, 4, 9, 20, None)]
    assert found == pytest.approx([16.0, 8.0, 4.0, 2.0, 1.0, 2.0, 2.0, 2.0])
    assert forecast.damage("m", Level.parse("int8-g64-asym"), 1.0, 9) == 3.0
    assert forecast.damage("another", level, 7.0, 0) == 7.0
