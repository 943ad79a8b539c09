"""The explorer's answers are those of `assay plan`, pins hold, and its own figures agree with the plans that it saves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from budget.test_joint import prices_for
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import engines
from assay.budget import caches
from assay.budget.plan import Plan
from assay.explore.session import Session
from assay.explore.state import Pin, State
from assay.measure.footprint import Footprint
from assay.measure.profile import Profile
from assay.model.errors import InputError
from assay.model.files import save_note


@pytest.fixture(scope="module")
def session(profile: Path) -> Session:
    return Session(Profile.open(profile))


def state(bits: float, *pins: tuple[str, str, str], engine: str = "transformers", **more: object) -> State:
    return State.parse(json.dumps({"bits": bits, "engine": engine, "pins": pins} | more))


def level_of(session: Session, wanted: State, block: str, role: str) -> str:
    index = session.cells.names.index((block, role))
    return session.setting(wanted)["levels"][session.answer(wanted)["cells"]["level"][index]]


@pytest.mark.parametrize("engine", ["transformers", "vllm", "assay", "plain"])
@pytest.mark.parametrize("bits", [5.0, 6.3, 7.9, 40])
def test_the_same_budget_gives_the_same_plan_as_the_command(session: Session, profile: Path, engine: str, bits: float) -> None:
    wanted = state(bits, engine=engine, context="64", batch=2)
    command = assay.plan(profile, bits=bits, engine=engine, context=64, batch=2)
    assert dataclasses.replace(session.plan(wanted), budget={}) == dataclasses.replace(command, budget={})
    shown = session.answer(wanted)
    assert (shown["bits"], shown["nbytes"], shown["serving"]) == (command.bits, command.nbytes_tensors, command.serving)
    promised = [command.predicted, command.predicted_low, command.predicted_high]
    assert [shown["predicted"], shown["low"], shown["high"]] == pytest.approx(promised)
    assert shown["uniform"]["nbytes"] == command.uniform["nbytes"]
    assert shown["uniform"]["predicted"] == pytest.approx(command.uniform["predicted"])
    assert sum(shown["cells"]["nbytes"]) == sum(c.nbytes for c in command.choices.values())
    assert sum(shown["cells"]["damage"]) == pytest.approx(sum(c.damage for c in command.choices.values()))


@pytest.mark.parametrize(("engine", "cache"), [("vllm", "fp8"), ("assay", "kivi2"), ("assay", "fp16")])
def test_a_priced_cache_is_in_the_plan_as_of_the_command(profile: Path, engine: str, cache: str, tmp_path: Path) -> None:
    priced = shutil.copytree(profile, tmp_path / "p")
    needs = Footprint.from_json(Profile.open(priced).index["footprint"])
    caches.save(priced, prices_for(len(needs.layers), needs.layers[0].keys), {})
    made, wanted = Session(Profile.open(priced)), state(12.0, engine=engine, context="64", batch=2, cache=cache)
    command = assay.plan(priced, engine=engine, **wanted.budget)
    assert command.cache and made.plan(wanted).to_text() == command.to_text()
    assert made.answer(wanted)["serving"] == command.serving
    pinned = made.plan(dataclasses.replace(wanted, pins=(Pin("0", "mlp.up", "keep"),)))
    assert pinned.cache["nats"] == command.cache["nats"]


def test_a_matrix_that_is_kept_is_as_with_keep(session: Session, profile: Path) -> None:
    wanted = state(8.0, ("*", "attn.v", "keep"), ("1", "mlp.down", "keep"))
    command = assay.plan(profile, bits=8.0, keep=("*.v_proj", "*.1.*down_proj"))
    made = session.plan(wanted)
    assert {n: c.level for n, c in made.choices.items()} == {n: c.level for n, c in command.choices.items()}
    assert made.choices["model.layers.1.mlp.down_proj.weight"].why == "pinned by hand"
    assert session.answer(wanted)["predicted"] == pytest.approx(command.predicted)


def test_a_pinned_level_holds_at_every_budget_and_the_rest_pays(session: Session) -> None:
    free = session.answer(state(5.0))
    for bits in (5.0, 6.0, 8.0):
        wanted = state(bits, ("0", "attn.q", "int8-channel-sym"))
        assert level_of(session, wanted, "0", "attn.q") == "int8-channel-sym"
        assert session.answer(wanted)["bits"] <= bits
    pinned = session.answer(state(5.0, ("0", "attn.q", "int8-channel-sym")))
    assert pinned["predicted"] >= free["predicted"]
    assert session.setting(state(5.0, ("0", "attn.q", "int8-channel-sym")))["pinned"] == [
        session.cells.names.index(("0", "attn.q"))
    ]


def test_of_two_pins_on_one_matrix_the_last_counts(session: Session) -> None:
    wanted = state(7.0, ("*", "attn.q", "int8-channel-sym"), ("1", "attn.q", "keep"))
    assert [level_of(session, wanted, b, "attn.q") for b in "01"] == ["int8-channel-sym", "keep"]


def test_what_an_engine_fuses_is_pinned_together(session: Session) -> None:
    wanted = state(11.0, ("0", "attn.q", "keep"), engine="vllm")
    assert {level_of(session, wanted, "0", role) for role in ("attn.q", "attn.k", "attn.v")} == {"keep"}
    assert session.cell(wanted, "0", "attn.k")["together"] == ["attn.k", "attn.q", "attn.v"]
    assert session.cell(wanted, "0", "attn.k")["pinned"] and not session.cell(wanted, "1", "attn.k")["pinned"]


def test_a_cell_says_what_its_levels_would_cost(session: Session) -> None:
    wanted = state(5.0)
    found = session.cell(wanted, "0", "mlp.up")
    used = level_of(session, wanted, "0", "mlp.up")
    assert found["levels"] == {used: 1}
    (shown,) = [o for o in found["options"] if o["level"] == used]
    index = session.cells.names.index(("0", "mlp.up"))
    cells = session.answer(wanted)["cells"]
    assert (shown["nbytes"], shown["damage"]) == (cells["nbytes"][index], cells["damage"][index])
    for option in found["options"]:
        assert level_of(session, state(9.0, ("0", "mlp.up", option["level"])), "0", "mlp.up") == option["level"]


def test_the_frontier_falls_and_no_single_level_is_below_it(session: Session) -> None:
    found = session.setting(state(5.0))
    points = found["frontier"]
    assert all(a["nbytes"] <= b["nbytes"] and a["predicted"] >= b["predicted"] for a, b in pairwise(points))
    for flat in found["uniform"]:
        best = min(p["predicted"] for p in points if p["nbytes"] <= flat["nbytes"])
        plan = session.answer(state(max(flat["bits"], found["reach"][0])))
        assert plan["predicted"] <= flat["predicted"] * (1 + 1e-9)
        assert plan["predicted"] <= best * (1 + 1e-9)


@given(st.floats(3.5, 16), st.lists(st.tuples(st.sampled_from("01*"), st.sampled_from(["attn.q", "mlp.up", "*"])), max_size=4))
@settings(max_examples=40)
def test_no_budget_and_no_pins_take_more_than_was_asked(session: Session, bits: float, where: list[tuple[str, str]]) -> None:
    wanted = state(bits, *((b, r, "int4-channel-asym") for b, r in where))
    try:
        shown = session.answer(wanted)
    except InputError as error:
        assert "out of reach" in str(error) and bits < session.setting(wanted)["reach"][0]
        return
    assert shown["bits"] <= bits
    assert shown["low"] <= shown["predicted"] <= shown["high"]


def test_a_saved_plan_is_read_back_compared_and_never_replaced(session: Session, profile: Path, tmp_path: Path) -> None:
    wanted = state(5.0, ("0", "mlp.up", "int8-channel-sym"), context=64)
    path = session.save(wanted, str(tmp_path / "a.yaml"))
    written, shown = path.read_bytes(), session.answer(wanted)
    read = Plan.load(path)
    assert {n: c.level for n, c in read.choices.items()} == {n: c.level for n, c in session.plan(wanted).choices.items()}
    other = session.compare(path)
    assert (other["bits"], other["nbytes"], other["serving"]) == (shown["bits"], shown["nbytes"], shown["serving"])
    assert other["predicted"] == pytest.approx(shown["predicted"])
    names = session.setting(wanted)["levels"]
    assert [other["levels"][i] for i in other["cells"]["level"]] == [names[i] for i in shown["cells"]["level"]]
    with pytest.raises(InputError, match="exists; choose another name"):
        session.save(state(6.0), str(path))
    assert path.read_bytes() == written
    for bad, words in (("", "name a file"), ("a\0b", "name a file"), (str(tmp_path / "no" / "a.yaml"), "does not exist")):
        with pytest.raises(InputError, match=words):
            session.save(wanted, bad)
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


def test_the_cache_grows_with_the_context_and_what_is_unknown_is_said(session: Session) -> None:
    short, long = (session.answer(state(5.0, context=n))["serving"]["bytes"]["cache"] for n in (32, 64))
    assert 0 < 2 * short == long
    assert session.answer(state(5.0))["serving"] is None
    assert "tokens that this model reads" in session.answer(state(5.0, context=10**6))["serving"]["error"]
    assert "transformers has fp16" in session.answer(state(5.0, context=32, cache="fp8"))["serving"]["error"]


def test_every_engine_has_caches_and_an_answer_or_a_reason(session: Session) -> None:
    facts = session.facts("transformers", "auto")
    assert {*engines.NAMES} - {*facts["engines"]} == {"awq"} and all(facts["caches"].values())
    with pytest.raises(InputError, match="awq holds one level for the whole model"):
        session.facts("awq", "auto")
    with pytest.raises(InputError, match="awq holds one level for the whole model"):
        session.answer(state(9.0, engine="awq"))
    for engine in facts["engines"]:
        try:
            assert session.answer(state(9.0, engine=engine, context=32))["serving"]["total"] > 0
        except InputError as error:
            assert "nothing can be made smaller" in str(error) or "llama.cpp has no tokenizers" in str(error)


def test_gguf_counts_the_bytes_of_its_own_tensors(profile: Path, tmp_path: Path) -> None:
    index = dict(Profile.open(profile).index) | {"gguf": {"file_bytes": 800_000, "tensor_bytes": 700_000}}
    save_note(tmp_path / "profile.json", index)
    command = assay.plan(tmp_path, bits=9.0, engine="llama.cpp")
    assert Session(Profile.open(tmp_path)).answer(state(9.0, engine="llama.cpp"))["nbytes"] == command.nbytes_tensors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "lacks a part"),
        ('{"bits": 4}', "lacks a part"),
        ('{"bits": 4, "engine": "plain", "extra": 1}', "one too many"),
        ('{"bits": "4", "engine": "plain"}', "bits must be"),
        ('{"bits": NaN, "engine": "plain"}', "bits must be"),
        ('{"bits": true, "engine": "plain"}', "bits must be"),
        ('{"bits": 4, "engine": 5}', "engine must be"),
        ('{"bits": 4, "engine": "plain", "batch": 0}', "batch must be"),
        ('{"bits": 4, "engine": "plain", "context": "many"}', "number of tokens"),
        ('{"bits": 4, "engine": "plain", "pins": {}}', "pins must be"),
        ('{"bits": 4, "engine": "plain", "pins": [["0", "attn.q"]]}', "a pin is"),
        ('{"bits": 4, "engine": "nothing"}', "unknown engine"),
        ('{"bits": 4, "engine": "plain", "method": "nothing"}', "unknown method"),
        ('{"bits": 0.5, "engine": "plain"}', "out of reach; this model"),
        ('{"bits": 4, "engine": "plain", "pins": [["*", "*", "keep"]]}', "out of reach; these pins"),
        ('{"bits": 4, "engine": "plain", "pins": [["9", "attn.q", "keep"]]}', "which this model lacks"),
        ('{"bits": 4, "engine": "plain", "pins": [["0", "attn.q", "int9"]]}', "can't have int9; choose"),
    ],
)
def test_a_state_that_can_not_be_is_refused_in_one_line(session: Session, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        session.answer(State.parse(text))
    assert "\n" not in str(caught.value)


def test_a_damaged_profile_is_refused(profile: Path) -> None:
    whole = Profile.open(profile)
    for name in ("rows", "ratios", "probes", "names", "model", "calibration"):
        with pytest.raises(InputError, match="damaged profile"):
            Session(dataclasses.replace(whole, index={k: v for k, v in whole.index.items() if k != name}))


def test_a_state_survives_its_own_text(session: Session) -> None:
    wanted = state(5.0, ("0", "mlp.up", "keep"), context="1k", batch=3)
    assert State.parse(json.dumps(wanted.to_json())) == wanted and wanted.context == 1024
