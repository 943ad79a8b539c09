"""One level everywhere: measured with what it needs alone, and as with everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import assay
from assay import engines
from assay.budget import plans
from assay.budget.size import Budget
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.run import open_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of the built-in model, with every price of GPTQ."""
    return assay.profile("builtin", tmp_path_factory.mktemp("measured") / "p", tokens=2048, methods=["gptq"])


@pytest.mark.parametrize("engine", ["transformers", "vllm", "assay"])
def test_the_level_of_a_uniform_plan_is_among_those_that_are_priced_for_it(measured: Profile, engine: str) -> None:
    model, contract = StreamedModel(open_model("builtin")), engines.get(engine)
    for bits in [x / 10 for x in range(45 if engine == "vllm" else 22, 86, 3)]:
        budget = Budget(bits=bits)
        plan = plans.make(measured, budget, contract, "gptq", (), "lagrange", True)
        levels = plans.outlook(model, budget, contract, "gptq", (), True).levels
        assert {c.level for c in plan.choices.values() if c.level} <= levels, bits
        assert len(levels) <= 8


@pytest.mark.parametrize("asked", [{"bits": 3.4, "uniform": True}, {"level": "int2-g64-asym"}])
def test_a_plan_of_one_level_is_carried_out_alike_from_prices_of_all_and_of_few(
    measured: Profile, tmp_path: Path, asked: dict[str, object]
) -> None:
    found = {}
    for name, source in (("all", {"profile": measured.folder}), ("few", {"tokens": 2048})):
        assay.compress("builtin", tmp_path / name, method="gptq", **asked, **source)
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        found[name] = weights, json.loads((tmp_path / name / "assay" / "recipe.json").read_text())
    (weights, recipe), (same, few) = found["all"], found["few"]
    assert weights == same
    assert few["predicted"]["kl"] == pytest.approx(recipe["predicted"]["kl"], rel=0.1)
    assert recipe["frontier"] and not few["frontier"]  # prices of one level say nothing of other sizes
    assert "other sizes were not priced" in (tmp_path / "few" / "assay" / "report.html").read_text()
