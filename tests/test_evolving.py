"""The search by measured KL: what it runs is what compress makes, it keeps the budget, and it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import assay
from assay import engines, evolving
from assay.budget import plans
from assay.budget.planners.evolution import Stage
from assay.budget.size import Budget
from assay.execute import execute
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare
from assay.prove.variants import mean_kl

BITS = 3.2
METHOD = "gptq"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("evolving") / "p"
    return assay.profile("builtin", folder, tokens=1024, window=128, methods=(METHOD,))


@pytest.fixture(scope="module")
def model() -> StreamedModel:
    return StreamedModel(assay.run.open_model("builtin"))


def test_variants_have_the_kl_of_candidates_one_by_one(profiled: Profile, model: StreamedModel, tmp_path: Path) -> None:
    """Three variants that share blocks, one of them the original, against the streamed comparison of the executed plan."""
    plan = plans.make(profiled, Budget(bits=BITS), engines.get("transformers"), METHOD, (), "lagrange", False)
    results = execute(model, plan, profiled, tmp_path / "b", Silent())
    ids = torch.tensor(profiled.index["held_out"])[:4]

    def decoded(site, weight):
        return results.packed(site.name).decode().float()

    store = evolving.LevelStore(model, profiled, METHOD, tmp_path / "s")

    def override(block, key):
        return lambda site, weight: store.decoded(site, plan.choices[site.name].level)

    count = len(model.blocks)
    variants = [[None] * count, ["plan"] * count, [*["plan"] * 3, *[None] * (count - 3)]]
    none, whole, half = mean_kl(model, ids, variants, override)
    scores = compare(model, {"whole": Candidate(model, decoded)}, Windows(ids, "held out"), Silent())
    assert none == 0
    assert whole == pytest.approx(float(torch.cat(scores["whole"].kl).double().mean()), rel=1e-3)
    assert 0 < half < whole


def test_what_was_encoded_for_a_search_is_read_back(profiled: Profile, model: StreamedModel, tmp_path: Path) -> None:
    site = next(s for s in model.anatomy.sites.values() if s.block == 1)
    made, again = (evolving.LevelStore(model, profiled, METHOD, tmp_path).decoded(site, "int3-g64-asym") for _ in range(2))
    assert torch.equal(made, again)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_search_keeps_the_budget_and_continues(
    profiled: Profile, model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two generations; then the same call with its state there returns the same plan without measuring candidates."""
    monkeypatch.setattr(evolving, "OFFSPRING", 16)
    monkeypatch.setattr(evolving, "STAGES", (Stage(3, 0.0), Stage(1, 0.25), Stage(1, 1.0)))
    contract = engines.get("transformers")
    plan = plans.make(profiled, Budget(bits=BITS), contract, METHOD, (), "lagrange", False)
    made = evolving.evolved(model, profiled, plan, contract, (), 1e-9, tmp_path, Silent())
    state = json.loads(next(tmp_path.glob("evolution-*.json")).read_text())
    assert state["generation"] == 1 and made.bits <= BITS
    assert made.predicted <= plan.predicted, "never worse on held-out text"
    encoded = len(list((tmp_path / f"levels-{METHOD}").glob("*.safetensors")))
    again = evolving.evolved(model, profiled, plan, contract, (), 1e-9, tmp_path, Silent())
    assert again == made
    assert len(list((tmp_path / f"levels-{METHOD}").glob("*.safetensors"))) == encoded


def test_fused_sites_stay_together(
    profiled: Profile, model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evolving, "OFFSPRING", 4)
    monkeypatch.setattr(evolving, "STAGES", (Stage(1, 0.25), Stage(1, 1.0)))
    contract = engines.get("vllm")
    plan = plans.make(profiled, Budget(bits=6.0), contract, METHOD, (), "lagrange", False)
    made = evolving.evolved(model, profiled, plan, contract, (), 1e-9, tmp_path, Silent())
    for block in range(len(model.blocks)):
        fused = {made.choices[f"model.layers.{block}.self_attn.{x}_proj.weight"].level for x in "qkv"}
        assert len(fused) == 1


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"minutes": 1.0}, "--planner evolution, not of lagrange"),
        ({"planner": "evolution", "minutes": 0.0}, "above zero"),
        ({"planner": "evolution", "minutes": float("nan")}, "above zero"),
        ({"planner": "evolution", "bits": None, "level": "W4A16"}, "--level leaves nothing"),
        ({"planner": "evolution", "uniform": True}, "--uniform leaves nothing"),
        ({"planner": "evolutoin"}, "did you mean evolution"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(options: dict, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=wanted):
        assay.compress("builtin", tmp_path / "out", **({"bits": 4.0} | options))
    assert not list(tmp_path.iterdir())


def test_planning_from_a_profile_alone_says_that_evolution_needs_the_model(profiled: Profile) -> None:
    with pytest.raises(InputError, match="assay compress MODEL --planner evolution"):
        assay.plan(profiled.folder, bits=4.0, planner="evolution")
