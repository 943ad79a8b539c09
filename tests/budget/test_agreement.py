"""Two texts that disagree about what matters are told apart from two samples of one text, wherever they meet."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import short
import torch
from cli.calls import call, one_line
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import assay
from assay.budget.agreement import LIMIT, Reference, compared, extra_loss, noted
from assay.budget.spread import noise
from assay.builtin.corpus import corpus
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import reread, windows
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.run import open_model

PRICES = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(1, 50)), min_size=2, max_size=4)
FEW = {"tokens": 2048, "window": 128, "methods": ("gptq",)}


@given(PRICES)
def test_the_extra_loss_is_what_the_best_plan_of_the_other_text_would_save(rows: list[tuple[float, float, int]]) -> None:
    first, second, weights = (np.array(column, float) for column in zip(*rows, strict=True))
    bits = 4.0 * weights.sum()

    def best(prices: np.ndarray) -> np.ndarray:
        """Bits of each matrix, found by descent in the differences from the last one's."""

        def complete(x: np.ndarray) -> np.ndarray:
            return np.append(x, (bits - weights[:-1] @ x) / weights[-1])

        found = minimize(lambda x: np.log((prices * 4.0 ** -complete(x)).sum()), np.full(len(prices) - 1, 4.0), tol=1e-12)
        return complete(found.x)

    planned, own = ((second * 4.0 ** -best(prices)).sum() for prices in (first, second))
    names = [str(i) for i in range(len(rows))]
    tables = (dict(zip(names, column.tolist(), strict=True)) for column in (first, second, weights.astype(int)))
    assert extra_loss(*tables) == pytest.approx(planned / own - 1, rel=1e-2, abs=1e-4)


def test_texts_that_differ_by_a_factor_agree() -> None:
    prices = {"a": 1.0, "b": 3.0, "c": 0.0}
    assert extra_loss(prices, {n: 7 * p for n, p in prices.items()}, {"a": 10, "b": 2, "c": 5}) == pytest.approx(0)
    assert extra_loss(prices, {}, {}) == 0.0


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """alike: another part of the built-in text; odd: random letters; english: its reference text alone."""
    folder = tmp_path_factory.mktemp("texts")
    letters = random.Random(0)
    words = ("".join(letters.choice("abcdefghijklmnop 0123456789") for _ in range(6)) for _ in range(9000))
    held_out = list(corpus("evaluation"))
    found = {
        "alike": "\n".join(d.text for d in held_out),
        "odd": " ".join(words),
        "english": "\n".join(d.text for d in held_out if d.name.startswith("topic")),
    }
    for name, text in found.items():
        (folder / f"{name}.txt").write_text(text)
    return {name: folder / f"{name}.txt" for name in found}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("profiles")
    model = short.save(folder / "model", 2)
    for name, more in {
        "odd": {"target": texts["odd"]},
        "english": {"target": texts["english"]}, "chosen": {"target": texts["english"], "select": "dsir"},
    }.items():  # fmt: skip
        assay.profile(model, folder / name, **FEW, **more)
    return {name: folder / name for name in ("model", "odd", "english", "chosen")}


def found(profile: Path) -> dict[str, object]:
    return json.loads((profile / "profile.json").read_text())["target"]


def test_only_the_odd_text_is_warned_of(profiles: dict[str, Path], texts: dict[str, Path]) -> None:
    measured, model = Profile.open(profiles["odd"]), StreamedModel(open_model(profiles["model"]))
    text = windows(model.checkpoint, texts["alike"], "calibration", 4096, 128, model.vocabulary)
    alike = compared(model, Reference.of(measured), text, Silent())
    assert 0 <= alike["extra_loss"] < LIMIT < found(profiles["odd"])["extra_loss"]
    assert alike["warning"] is None
    said = found(profiles["odd"])["warning"]
    assert f"--target {texts['odd']}" in said
    assert assay.plan(profiles["odd"], bits=3.5).sentence.endswith(said)
    calm = Profile(profiles["odd"], dict(measured.index) | {"target": alike})
    plan = assay.plan(profiles["odd"], bits=3.5)
    assert noted(calm, plan) == plan


def test_noise_is_what_two_samples_of_one_text_differ_by() -> None:
    generator = torch.Generator().manual_seed(0)
    names, counts = [str(i) for i in range(30)], {str(i): 1 + i for i in range(30)}
    excess, guessed = [], []
    for _ in range(50):
        shared = 1 + 0.3 * torch.randn(1, 8, generator=generator)
        parts = shared + 0.2 * torch.randn(30, 8, generator=generator)
        excess.append(extra_loss(dict.fromkeys(names, 1.0), dict(zip(names, parts.mean(1).tolist(), strict=True)), counts))
        relative = parts / parts.mean(1, keepdim=True)
        guessed.append(noise(dict(zip(names, relative.tolist(), strict=True)), counts))
    assert sum(guessed) == pytest.approx(sum(excess), rel=0.2)


def test_choosing_what_is_like_the_target_brings_the_profile_closer(profiles: dict[str, Path]) -> None:
    assert found(profiles["chosen"])["extra_loss"] < 0.8 * found(profiles["english"])["extra_loss"]


def test_chosen_windows_are_found_again(profiles: dict[str, Path]) -> None:
    index = json.loads((profiles["chosen"] / "profile.json").read_text())
    facts, model = index["calibration"], open_model(profiles["model"])
    assert facts["select"] == "dsir" and len(facts["picked"]) == facts["tokens"] // 128 == 16
    assert facts["pool"] > 4 * facts["tokens"]
    again = reread(model, facts, 4096)
    assert again.digest == facts["digest"]
    held_out = {tuple(ids) for ids in index["held_out"]}
    assert not held_out & {tuple(ids) for ids in again.ids.tolist()}
    first = json.loads((profiles["odd"] / "profile.json").read_text())["calibration"]
    assert reread(model, first, 4096).digest == first["digest"]


def test_the_commands_say_it(
    profiles: dict[str, Path], texts: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    same = ("profile", profiles["model"], "-o", profiles["odd"], "--tokens", "2048", "--window", "128")
    code, out, _ = call(capfd, *same, "--target", texts["odd"])
    assert code == 0 and "warning:" in out and "disagree about what matters" in " ".join(out.split())
    code, _, err = call(capfd, *same)
    assert code == 2 and "other settings" in one_line(err)
    assay.compress(profiles["model"], tmp_path / "out", level="int4-g64-asym", method="gptq", profile=profiles["odd"])
    for name, warned in (("odd", True), ("alike", False)):
        more = ("--text", texts[name], "--tokens", "4096")
        code, out, _ = call(capfd, "verify", tmp_path / "out", "--against", profiles["model"], *more)
        assert code == 0
        assert ("disagree about what matters" in " ".join(out.split())) == warned


def test_wrong_selections_are_refused_before_anything_is_written(tmp_path: Path, texts: dict[str, Path]) -> None:
    for more, words in (
        ({"select": "dsir"}, "give it with --target"), ({"select": "dsri", "target": texts["odd"]}, "did you mean dsir?"),
        ({"select": "kmeans", "target": tmp_path / "absent.txt"}, "absent.txt"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words.replace("?", r"\?")):
            assay.profile("builtin", tmp_path / "p", **FEW, **more)
    assert not list(tmp_path.iterdir())
