"""Plans for llama.cpp keep to types that are read fast, as long as the size can be met with them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engines import real_gguf
from tiny import text_file

import assay
from assay import engines
from assay.budget import plans
from assay.budget.plan import Plan
from assay.budget.size import Budget
from assay.engines.llama_cpp import CONTRACT, FAST, SMALLER
from assay.measure.profile import Profile
from assay.methods import menus
from assay.model.errors import InputError
from assay.model.files import save_note

KINDS = ("nearest", "gptq", "two_sided")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose rows are whole blocks of 256 weights; prices fall with the bits, by a factor of 4, some sooner."""
    room = tmp_path_factory.mktemp("preferred")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
    real_gguf.lively("qwen3", room / "m", num_hidden_layers=2, **sizes)
    assay.profile(room / "m", room / "p", calibration=text_file(room), tokens=256, window=32, methods=("nearest",))
    index = dict(Profile.open(room / "p").index)
    chance = random.Random(0)
    for row in index["rows"]:
        levels = {level.name: chance.uniform(0.7, 1.4) * 4**-level.bits for level in menus.blocks(row["shape"][1])}
        weight = chance.uniform(0.1, 10)
        index["prices"][row["name"]] = {name: dict.fromkeys(KINDS, weight * p) for name, p in levels.items()}
    save_note(room / "p" / "profile.json", index)
    return room / "p"


def formats(plan: Plan) -> set[str]:
    return {level.format for level in plan.levels.values()}


@pytest.mark.parametrize("bits", [2.75, 3.5, 4.8, 6.0, 7.5])
def test_where_fast_types_suffice_there_are_no_others(profile: Path, bits: float) -> None:
    fast, every = (assay.plan(profile, bits=bits, engine=name) for name in ("llama.cpp", "llama.cpp-all"))
    assert formats(fast) <= set(FAST)
    assert max(fast.bits, every.bits) <= bits
    assert every.predicted <= fast.predicted < fast.uniform["predicted"] * 1.001


def test_a_size_below_them_takes_the_next_types_and_no_slower_ones_than_it_must(profile: Path) -> None:
    with pytest.raises(InputError, match="out of reach"):
        plans.make(Profile.open(profile), Budget(bits=2.5), CONTRACT.narrowed()[0], "ggml", (), "lagrange", False)
    between, least = (assay.plan(profile, bits=bits, engine="llama.cpp") for bits in (2.5, 2.2))
    assert formats(between) <= {*FAST, *SMALLER} and formats(between) & set(SMALLER)
    assert "iq2_xxs" in formats(least)
    assert between.bits <= 2.5 and least.bits <= 2.2


def test_the_frontier_is_the_plans_it_stands_for(profile: Path) -> None:
    points = assay.sweep(profile, 2.25, 5, 0.25, engine="llama.cpp")["points"]
    assert len(points) == 12
    for point in points:
        plan = assay.plan(profile, bits=point["target"], engine="llama.cpp")
        assert (plan.nbytes_tensors, plan.predicted) == (point["bytes"], pytest.approx(point["predicted"]))


def test_types_that_are_no_plan_s_own_choice_may_be_named(profile: Path, tmp_path: Path) -> None:
    assert formats(assay.plan(profile, level="iq3_s", engine="llama.cpp")) == {"iq3_s"}
    plan = assay.plan(profile, bits=4.8, engine="llama.cpp")
    plan.save(tmp_path / "plan.yaml")
    assert plans.checked(Profile.open(profile), Plan.load(tmp_path / "plan.yaml"), CONTRACT).to_text() == plan.to_text()
    site = next(iter(plan.levels))
    text = "\n".join(
        f"  {site}: iq4_xs" if line.lstrip().startswith(f"{site}:") else line for line in plan.to_text().splitlines()
    )
    (tmp_path / "edited.yaml").write_text(text)
    edited = plans.checked(Profile.open(profile), Plan.load(tmp_path / "edited.yaml"), engines.get("llama.cpp"))
    assert edited.levels[site].format == "iq4_xs"
