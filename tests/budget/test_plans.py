"""Plans of real profiles: their bytes are those of the files, and a plan from a file is checked before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file
from tiny import save, text_file

import assay
from assay import engines
from assay.budget import offers, plans
from assay.budget.plan import Plan
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level

SMALL = {"tokens": 1024, "window": 32}


def stacked(folder: Path) -> Path:
    """A mixtral whose files keep the experts as 3-D tensors, as transformers holds them."""
    save("mixtral", folder)
    state = build("mixtral")[1].state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def fp8(folder: Path, scale: float) -> Path:
    """A llama in bf16 whose matrices are FP8 codes with one scale each."""
    save("llama", folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            tensors |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), scale)}
        else:
            tensors[name] = weight.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fused", {"engine": "vllm", "bits": 7.0}),
        ("fused", {"engine": "transformers", "size": "150KB"}),
        ("stacked", {"engine": "plain", "bits": 28.5}),
        ("stacked", {"engine": "plain", "bits": 30.5, "keep": ("*.0.*",)}),
        ("fp8", {"engine": "transformers", "bits": 7.0, "keep": ("*.0.*q_proj",)}),
        ("transposed", {"engine": "assay", "bits": 5.0}),
        ("transposed", {"engine": "assay", "level": "int4-g32-sym"}),
        ("fp8 in powers of two", {"engine": "transformers", "bits": 7.0, "keep": ("*.0.*q_proj",)}),
    ],
)
def test_the_bytes_of_a_plan_add_up_to_those_of_the_files(kind: str, options: dict, tmp_path: Path) -> None:
    make = {
        "fused": lambda f: save("qwen3", f),
        "stacked": stacked,
        "transposed": lambda f: save("gpt2", f),
        "fp8": lambda f: fp8(f, 0.00037),
    }
    model = make.get(kind, lambda f: fp8(f, 2.0**-12))(tmp_path / "m")
    levels = [options["level"]] if "level" in options else []
    assay.profile(model, tmp_path / "p", calibration=text_file(tmp_path), levels=levels, **SMALL)
    plan = assay.plan(tmp_path / "p", **options)
    source = Checkpoint.open(model)
    sites = {r.name: r for r in offers.rows(StreamedModel(source), source.kept_nbytes)}
    for name, choice in plan.choices.items():
        row = sites[name]
        assert choice.nbytes == (Level.parse(choice.level).nbytes(*row.shape, 4) if choice.level else row.stored_bytes), name
    report = assay.compress(model, tmp_path / "out", plan=plan, profile=tmp_path / "p")
    written = Checkpoint.open(tmp_path / "out")
    stored = sum(info.nbytes for info in written.stored.values())
    ledger = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    assert sum(row["bytes_after"] for row in ledger) == stored
    if options["engine"] == "plain":  # its files hold what the packed bytes decode to
        saved = sum(sites[n].stored_bytes - choice.nbytes for n, choice in plan.choices.items())
        assert plan.nbytes_tensors == sum(source.kept_nbytes(n) for n in source.names) - saved
    else:
        assert plan.nbytes_tensors == stored
    assert report["bits_all"] == 8 * plan.nbytes_tensors / sum(torch.Size(source.shape(n)).numel() for n in source.names)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` with a profile `p`; `other` has the same text and another model, `q` the same model and another text."""
    folder = tmp_path_factory.mktemp("rooms")
    text = text_file(folder)
    assay.profile(save("llama", folder / "m"), folder / "p", calibration=text, **SMALL)
    assay.profile(save("llama", folder / "n", initializer_range=0.03), folder / "other", calibration=text, **SMALL)
    text_file(folder, "a dog, a fox.\n" * 200)
    assay.profile(folder / "m", folder / "q", calibration=text, **SMALL)
    text_file(folder)
    return folder


def reloaded(folder: Path, plan: Plan, **levels: str) -> Plan:
    """A plan that went through its file, some of its levels changed by hand: attn.q in block 0 is `l0.q_proj`."""
    plan.save(folder / "plan.yaml")
    lines = (folder / "plan.yaml").read_text().splitlines()
    for site, level in levels.items():
        block, name = site.split("__")
        (at,) = [i for i, line in enumerate(lines) if f"layers.{block[1:]}." in line and f".{name}." in line]
        key = lines[at].split(":")[0]
        lines[at] = f"{key}: {level} # changed"
    (folder / "plan.yaml").write_text("\n".join(lines) + "\n")
    return Plan.load(folder / "plan.yaml")


def check(folder: Path, plan: Plan) -> Plan:
    return plans.checked(Profile.open(folder), plan, engines.get(plan.engine))


@pytest.mark.parametrize(
    "options",
    [{"bits": 4.7}, {"bits": 4.7, "uniform": True}, {"size": "110KB"}, {"max_loss": 0.01}, {"bits": 7, "engine": "vllm"},
     {"level": "int4-g32-sym"}],
)  # fmt: skip
def test_a_plan_that_nobody_edited_says_the_same_after_its_file(rooms: Path, options: dict, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "p", **options)
    assert check(rooms / "p", reloaded(tmp_path, plan)) == plan


@pytest.mark.parametrize("planner", ["lagrange", "integer", "uniform", "baq"])
def test_more_bytes_buy_what_the_plan_said(rooms: Path, planner: str) -> None:
    plan = assay.plan(rooms / "p", size="110KB", planner=planner)
    more = assay.plan(rooms / "p", size=110_000 + plan.more["bytes"], planner=planner)
    assert more.predicted == pytest.approx(plan.more["predicted"], rel=0.05 if planner == "integer" else 1e-9)


def test_an_edit_changes_the_figures_that_follow_from_it_and_no_others(rooms: Path, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "p", bits=5.0)
    edited = check(rooms / "p", reloaded(tmp_path, plan, l0__down_proj="int2-channel-asym", l1__v_proj="int2-g32-asym"))
    moved = [name for name in plan.choices if plan.choices[name] != edited.choices[name]]
    assert sorted(name.split(".")[-2] for name in moved) == ["down_proj", "v_proj"]
    saved = sum(plan.choices[n].nbytes - edited.choices[n].nbytes for n in moved)
    lost = sum(edited.choices[n].damage - plan.choices[n].damage for n in moved)
    inside = sum(r["shape"][0] * r["shape"][1] for r in Profile.open(rooms / "p").index["rows"] if r["block"] is not None)
    assert saved > 0 and lost > 0
    assert edited.nbytes_tensors == plan.nbytes_tensors - saved
    assert edited.bits == pytest.approx(plan.bits - 8 * saved / inside)
    assert edited.bits_all < plan.bits_all
    assert edited.predicted > plan.predicted and edited.predicted_high > plan.predicted_high
    assert edited.gap > plan.gap
    assert edited.uniform == plan.uniform and edited.budget == plan.budget
    assert edited.sentence.startswith(f"predicted KL {edited.predicted:.4f}") and edited.sentence != plan.sentence


def test_a_plan_of_one_level_may_be_edited_to_others(rooms: Path, tmp_path: Path) -> None:
    level, other = "int4-g32-sym", "int8-channel-sym"
    plan = assay.plan(rooms / "p", level=level)
    edited = check(rooms / "p", reloaded(tmp_path, plan, l0__q_proj=other))
    moved = {n: c.level for n, c in edited.choices.items() if c.level != plan.choices[n].level}
    assert moved == {"model.layers.0.self_attn.q_proj.weight": other}
    assert edited.predicted < plan.predicted and edited.uniform["nbytes"] <= edited.nbytes_tensors
    with pytest.raises(InputError, match="doesn't allow nf4-g32; choose "):
        check(rooms / "p", reloaded(tmp_path, plan, l0__q_proj="nf4-g32"))


@pytest.mark.parametrize("budget", [{"bits": 7.0}, {"level": "int4-g32-asym"}])
def test_a_plan_of_an_engine_of_one_level_is_compared_with_such_plans(rooms: Path, budget: dict, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "p", engine="awq", **budget)
    assert check(rooms / "p", reloaded(tmp_path, plan)) == plan


def test_a_level_whose_groups_do_not_divide_some_matrix_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "m", intermediate_size=96)
    text, level = text_file(tmp_path), "int4-g64-asym"
    plain = "int4-g64-asym: model.layers.0.mlp.down_proj.weight: group size 64 does not divide 96 inputs; sizes that fit: 32, or"
    with pytest.raises(InputError, match=plain):
        assay.compress(model, tmp_path / "o", level=level, calibration=text, **SMALL)
    with pytest.raises(InputError, match=r"group size 7 does not divide 64 inputs"):
        assay.profile(model, tmp_path / "p", levels=["int4-g7-asym"], calibration=text, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "text.txt"]
    assay.profile(model, tmp_path / "p", levels=[level], calibration=text, **SMALL)
    with pytest.raises(InputError, match="does not divide 96 inputs"):
        assay.plan(tmp_path / "p", level=level)
    choices = assay.plan(tmp_path / "p", level=level, keep=["*down_proj*"]).choices
    assert {choice.level for name, choice in choices.items() if "layers" in name and "down_proj" not in name} == {level}


def test_a_mixed_plan_made_by_hand_is_not_called_uniform(rooms: Path, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "p", bits=5.0, uniform=True)
    assert plan.sentence.endswith(f"; uniform {plan.uniform['level']}")
    bad = {f"l{b}__{n}_proj": "int2-channel-asym" for b in (0, 1) for n in ("q", "k", "v", "o", "gate", "up")}
    edited = check(rooms / "p", reloaded(tmp_path, plan, **bad))
    assert edited.predicted > 2 * plan.predicted
    assert edited.uniform["predicted"] == plan.predicted
    assert f"; uniform {plan.uniform['level']} in the same budget" in edited.sentence


def test_uniform_is_named_by_what_there_is_a_choice_for(rooms: Path) -> None:
    plan = assay.plan(rooms / "p", bits=24.0, keep=["*.1.*", "*.self_attn.*"])
    picked = {choice.level for choice in plan.choices.values()} - {None}
    assert sum(choice.level is None for choice in plan.choices.values()) > len(plan.choices) / 2 and picked
    assert plan.uniform["level"] is not None and "None" not in plan.sentence


@pytest.mark.parametrize(("unit", "budget"), [("bits", {"bits": 0.5}), ("size", {"size": "20KB"})])
@pytest.mark.parametrize("keep", [[], ["*.1.*"], ["*q_proj*"], ["*down_proj*"]], ids=str)
def test_the_least_that_is_said_to_be_allowed_is(rooms: Path, unit: str, budget: dict[str, Any], keep: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        assay.plan(rooms / "p", keep=keep, **budget)
    least = str(refused.value).split("allow ")[1].split(" to ")[0]
    assay.plan(rooms / "p", keep=keep, **({"bits": float(least)} if unit == "bits" else {"size": f"{least}MB"}))


def test_outside_the_blocks_alone_a_level_is_uniform_too(rooms: Path, tmp_path: Path) -> None:
    save("llama", tmp_path / "m", tie_word_embeddings=False)
    assay.profile(tmp_path / "m", tmp_path / "p", calibration=text_file(tmp_path), methods=["ggml"], **SMALL)
    whole = Profile.open(tmp_path / "p").index["file_bytes"]
    plan = assay.plan(tmp_path / "p", size=whole * 0.97, engine="assay", method="ggml", keep=["*layers*"])
    assert {choice.level for choice in plan.choices.values()} != {None}
    assert plan.uniform["level"] is not None and f"uniform {plan.uniform['level']}" in plan.sentence
    rows = assay.sweep(rooms / "p", 27, 30, 0.5, keep=["*mlp*", "*.1.*"])["points"]
    assert any(row["uniform"]["level"] for row in rows)


def test_a_budget_for_everything_as_it_is_names_no_uniform_level(rooms: Path) -> None:
    plan = assay.plan(rooms / "p", bits=32)
    assert {choice.level for choice in plan.choices.values()} == {None}
    assert plan.sentence.endswith("the budget holds every matrix as it is")


def test_an_edit_past_the_budget_is_compared_with_what_is_uniform_in_its_bytes(rooms: Path, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "p", bits=3.0)
    edited = check(rooms / "p", reloaded(tmp_path, plan, l0__down_proj="keep", l1__down_proj="keep"))
    assert edited.bits > 3.0 >= plan.bits
    assert plan.uniform["nbytes"] < edited.uniform["nbytes"] <= edited.nbytes_tensors


def test_plans_of_other_models_and_other_profiles_are_refused(rooms: Path, tmp_path: Path) -> None:
    plan = reloaded(tmp_path, assay.plan(rooms / "p", bits=4.7))
    assert Profile.open(rooms / "other").index["calibration"]["digest"] == plan.profile
    with pytest.raises(InputError, match="another model"):
        check(rooms / "other", plan)
    assert Profile.open(rooms / "q").index["model"] == plan.model
    with pytest.raises(InputError, match="another profile"):
        check(rooms / "q", plan)
    check(rooms / "p", reloaded(tmp_path, plan, l0__q_proj="int8-g32-asym"))


def test_a_plan_from_another_text_is_refused_before_anything_is_measured(rooms: Path, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "q", bits=4.7)
    with pytest.raises(InputError, match="give that one with --profile"):
        assay.compress(rooms / "m", tmp_path / "out", plan=plan, calibration=rooms / "text.txt", **SMALL)
    assert not list(tmp_path.iterdir())
    same = assay.plan(rooms / "p", bits=4.7)
    assay.compress(rooms / "m", tmp_path / "out", plan=same, calibration=rooms / "text.txt", **SMALL)


def test_a_group_size_that_does_not_divide_names_those_that_do(rooms: Path, tmp_path: Path) -> None:
    plan = assay.plan(rooms / "p", bits=4.7)
    with pytest.raises(InputError, match=r"down_proj.weight: group size 64 does not divide 96 inputs; sizes that fit: 32"):
        check(rooms / "p", reloaded(tmp_path, plan, l0__down_proj="int4-g64-asym"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 0.5}, "--bits 0.5 is out of reach"),
        ({"size": "20KB"}, "--size 20KB is out of reach"),
        ({"bits": 4.7, "keep": ("*",)}, "--keep matches all"),
        ({"bits": 4.7, "keep": ("*.q_prj",)}, "matches nothing"),
    ],
)
def test_what_can_not_be_is_refused_before_measuring_as_after(rooms: Path, options: dict, words: str, tmp_path: Path) -> None:
    said = set()
    for further in ({"profile": rooms / "p"}, {"calibration": rooms / "text.txt"} | SMALL):
        with pytest.raises(InputError, match=words) as caught:
            assay.compress(rooms / "m", tmp_path / "out", **options, **further)
        said.add(str(caught.value))
    with pytest.raises(InputError, match=words) as caught:
        assay.plan(rooms / "p", **options)
    assert said == {str(caught.value)}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["transformers", "vllm", "assay"])
@pytest.mark.parametrize("size", [90_000, 120_000, 250_000])
def test_a_size_bounds_the_weight_files_of_every_engine(rooms: Path, engine: str, size: int, tmp_path: Path) -> None:
    report = assay.compress(rooms / "m", tmp_path / "out", size=size, engine=engine, profile=rooms / "p")
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.7 * size < files == report["bytes"] <= size
