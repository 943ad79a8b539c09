"""Plans as text: the same bytes each time, read back as written, an editor's mistakes told in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from budget.tables import LEVELS, decision
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.budget.menu import Decision
from assay.budget.plan import Choice, Plan, validate
from assay.model.errors import InputError

NAMES = (
    "model.layers.0.q_proj.weight",
    "model.layers.0.k_proj.weight",
    "model.layers.1.o_proj.weight",
    "lm_head.weight",
)


def plan(choices: dict[str, Choice] | None = None, **header: Any) -> Plan:
    made = {
        NAMES[0]: Choice(LEVELS[0], 500, 0.25, "smallest choice"),
        NAMES[1]: Choice(LEVELS[0], 500, 0.25, "smallest choice"),
        NAMES[2]: Choice(LEVELS[1], 600, 1e-9, "why: # not"),
        NAMES[3]: Choice(None, 2000, 0.0, "kept: no level allowed"),
    }
    fields: dict[str, Any] = {
        "model": "0123",
        "profile": "12e4",
        "engine": "vllm",
        "method": "gptq",
        "budget": {"bits": 4},
        "nbytes_tensors": 3600,
        "bits": 4.0,
        "bits_all": 5.5,
        "predicted": 1e-5,
        "predicted_low": 0.0,
        "predicted_high": 0.1,
        "uniform": {"level": LEVELS[1], "nbytes": 3700, "bits": 4, "predicted": 0.02},
        "gap": 0.0,
        "sentence": "a: b # c",
    }
    return Plan(choices=made if choices is None else choices, **(fields | header))


def decisions() -> list[Decision]:
    fused, alone = (decision(i, [500, 600, 2000], [2.0, 1.0], LEVELS[:2], True) for i in range(2))
    head = decision(2, [2000], [], [], False)
    return [
        dataclasses.replace(fused, name=NAMES[0], sites=NAMES[:2]),
        dataclasses.replace(alone, name=NAMES[2], sites=NAMES[2:3]),
        dataclasses.replace(head, name=NAMES[3], sites=NAMES[3:]),
    ]


def header(made: Plan) -> dict[str, Any]:
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "choices"}


def levels(made: Plan) -> dict[str, str | None]:
    return {name: choice.level for name, choice in made.choices.items()}


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = plan().to_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def test_a_plan_reads_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan().save(path)
    back = Plan.load(path)
    assert header(back) == header(plan())
    assert list(levels(back).items()) == list(levels(plan()).items())
    validate(back, decisions())


def test_the_text_is_the_same_each_time_and_plain_yaml(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    plan().save(one)
    dataclasses.replace(Plan.load(one), choices=plan().choices).save(other)
    assert one.read_bytes() == other.read_bytes() == plan().to_text().encode()
    assert set(yaml.safe_load(one.read_text())["levels"]) == set(NAMES)


def test_sites_are_aligned_lines_and_blocks_are_paragraphs() -> None:
    body = plan().to_text().partition("levels:\n")[2].removesuffix("\n")
    paragraphs = [part.splitlines() for part in body.split("\n\n")]
    assert [len(lines) for lines in paragraphs] == [2, 1, 1]
    lines = [line for part in paragraphs for line in part]
    assert [line.split(":")[0].strip() for line in lines] == list(NAMES)
    starts = {line.index(word) for line in lines for word in (*LEVELS[:2], "keep ") if f" {word}" in line}
    assert len(starts) == 1
    assert len({line.index("#") for line in lines}) == 1


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=60)
@given(
    st.dictionaries(words, st.sampled_from([None, *LEVELS]), max_size=6),
    st.floats(allow_nan=False, allow_infinity=False),
    words,
)
def test_any_names_and_numbers_read_back(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, str | None], number: float, sentence: str
) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    made = plan(
        {name: Choice(level, 1, 0.5, "x") for name, level in wanted.items()},
        predicted=number,
        sentence=sentence,
    )
    made.save(path)
    back = Plan.load(path)
    assert header(back) == header(made)
    assert levels(back) == wanted


@pytest.mark.parametrize("name", ["1.50", "null", "[0]", "a: b", "a #b", "0x1f", "é", "w[3,(0, 64)]", "*x", "<<", "=", "yes"])
def test_names_that_yaml_would_read_as_something_else(name: str, tmp_path: Path) -> None:
    plan({name: Choice(None, 1, 0.0, "x")}).save(tmp_path / "plan.yaml")
    assert list(Plan.load(tmp_path / "plan.yaml").choices) == [name]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("keep ", "int9-g64-asym ", "lm_head.weight: unknown level: int has 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
        ("keep ", "4 ", "lm_head.weight: unknown level '4'"),
        ("gap: 0.0\n", "", "missing or unknown: gap"),
        ("gap: 0.0\n", "gap: 0.0\ncolour: red\n", "missing or unknown: colour"),
        ("gap: 0.0\n", "gap: 0.0\n1: red\n", "missing or unknown: 1"),
        ("nbytes_tensors: 3600", "nbytes_tensors: many", "nbytes_tensors must be a whole number"),
        ("\nbits: 4.0", "\nbits: true", "bits must be a number"),
        ("engine: vllm", "engine:", "engine must be text"),
        ("budget:\n  bits: 4", "budget: 4", "budget must be a mapping"),
        ("budget:\n  bits: 4", "budget:\n  bots: 4", "budget must be one of size, bits, memory, max_loss"),
        ("budget:\n  bits: 4", "budget: {bits: 4, size: 1GB}", "--size and --bits"),
        ("  lm_head.weight: ", "  model.layers.1.o_proj.weight: keep\n  lm_head.weight: ", "is there twice"),
        ("gap: 0.0\n", "gap: 0.0\ngap: 0.0\n", "gap is there twice"),
        ("levels:\n", "levels: keep\nrest:\n", "missing or unknown: rest"),
        ("levels:\n", "levels: [\n", "not a plan"),
        ("engine: vllm", "engine: !!python/name:os.system", "not a plan"),
    ],
)
def test_mistakes_of_an_editor_are_told_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan.load(edited(tmp_path, old, new))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff\xfe\x00", b"a: &x [*x]\n", b"? [a]\n: b\n", b"{}\x00"])
def test_files_that_are_no_plans(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    for wrong in (path, tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(InputError) as caught:
            Plan.load(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            NAMES[2],
            "model.layers.1.o_prj.weight",
            f"o_prj.weight, which this model lacks; near it: {NAMES[2]}",
        ),
        (f"{NAMES[0]}: {LEVELS[0]}", f"{NAMES[0]}: {LEVELS[1]}", "are fused in vllm: give them one level"),
        (f"{NAMES[2]}: {LEVELS[1]}", f"{NAMES[2]}: {LEVELS[9]}", f"doesn't allow {LEVELS[9]}; choose"),
        ("keep ", f"{LEVELS[0]} ", "lm_head.weight: vllm or the menu doesn't allow"),
    ],
)
def test_edits_that_the_model_or_the_engine_refuse(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(Plan.load(edited(tmp_path, old, new)), decisions())
    assert words in str(caught.value)


def test_a_site_left_out_is_missed() -> None:
    with pytest.raises(InputError, match="the plan lacks lm_head.weight"):
        validate(plan({n: c for n, c in plan().choices.items() if n != "lm_head.weight"}), decisions())


def test_an_allowed_edit_is_taken(tmp_path: Path) -> None:
    back = Plan.load(edited(tmp_path, f"{NAMES[2]}: {LEVELS[1]}", f"{NAMES[2]}: keep"))
    validate(back, decisions())
    assert levels(back)[NAMES[2]] is None
