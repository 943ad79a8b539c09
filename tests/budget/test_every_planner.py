"""Every planner on a real profile: the same bytes whatever the threads, fused sites together, and the budget kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import assay
from assay import engines
from assay.budget import offers, planners
from assay.budget.plan import Plan, validate
from assay.measure.profile import Profile
from assay.model.errors import InputError

METHOD = "gptq"
OFFLINE = [name for name in planners.names() if name != "evolution"]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[Profile]:
    """The same command with one thread and with three."""
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("same")
    found = []
    try:
        for index, threads in enumerate((1, 3)):
            torch.set_num_threads(threads)
            found.append(assay.profile("builtin", folder / str(index), tokens=512, window=128, methods=[METHOD]))
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("name", OFFLINE)
def test_the_same_command_gives_the_same_plan_whatever_the_threads(name: str, profiles: list[Profile]) -> None:
    texts = [assay.plan(p.folder, bits=3.2, method=METHOD, planner=name).to_text() for p in (*profiles, profiles[0])]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("budget", [{"bits": 4.6}, {"size": "5MB"}], ids=str)
def test_what_an_engine_fuses_shares_a_level_and_the_budget_is_kept(
    name: str, budget: dict, profiles: list[Profile], tmp_path: Path
) -> None:
    plan = assay.plan(profiles[0].folder, **budget, engine="vllm", method=METHOD, planner=name)
    assert plan.bits <= budget.get("bits", 16)
    plan.save(tmp_path / "plan.yaml")
    menu = offers.decisions(profiles[0], engines.get("vllm"), METHOD, "size" in budget, ())
    validate(Plan.load(tmp_path / "plan.yaml"), menu)
    assert len({plan.choices[f"model.layers.0.self_attn.{x}_proj.weight"].level for x in "qkv"}) == 1
    assert plan.predicted <= plan.uniform["predicted"] * (1 + 1e-9)


def test_a_bound_on_the_loss_is_met_by_the_planners_that_can(profiles: list[Profile]) -> None:
    sizes = {}
    for name in ("lagrange", "bisection", "uniform"):
        plan = assay.plan(profiles[0].folder, max_loss=0.05, method=METHOD, planner=name)
        assert plan.predicted_high <= 0.05
        sizes[name] = plan.nbytes_tensors
    assert sizes["lagrange"] <= min(sizes["bisection"], sizes["uniform"])
    with pytest.raises(InputError, match="with --max-loss use bisection, lagrange or uniform"):
        assay.plan(profiles[0].folder, max_loss=0.05, method=METHOD, planner="dynamic")


def test_uniform_takes_the_smallest_single_level_within_a_loss(profiles: list[Profile]) -> None:
    plan = assay.plan(profiles[0].folder, max_loss=0.05, method=METHOD, uniform=True)
    (level,) = {c.level for n, c in plan.choices.items() if "layers." in n and c.level}
    assert plan.uniform["level"] == level
    smaller = assay.plan(profiles[0].folder, bits=plan.bits - 1e-6, method=METHOD, uniform=True)
    assert plan.predicted_high <= 0.05 < smaller.predicted_high
