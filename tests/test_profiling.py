"""Profiles in folders that hold something already, and on as many tokens as it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TEXT, save, text_file

import assay
from assay.measure.profile import ALL_GRADIENTS, Gradients, Profile
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.profiling import Scope

SMALL = {"window": 16, "tokens": "auto"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    text_file(tmp_path)
    return save("llama", tmp_path / "m")


def test_tokens_auto_leaves_nothing_but_the_profile_and_finds_it_again(model: Path) -> None:
    room, text = model.parent, model.parent / "text.txt"
    (room / "p.4096").mkdir()
    (room / "p.4096" / "notes.txt").write_text("mine")
    before = {path.name for path in room.iterdir()}
    made = assay.profile(model, room / "p", calibration=text, **SMALL)
    assert {path.name for path in room.iterdir()} == before | {"p"}
    assert (room / "p.4096" / "notes.txt").read_text() == "mine"
    assert assay.profile(model, room / "p", calibration=text, **SMALL).index == made.index


def test_tokens_auto_takes_no_other_profile_for_its_own(model: Path) -> None:
    room, text = model.parent, model.parent / "text.txt"
    assay.profile(model, room / "p", calibration=text, **SMALL)
    for other, more in ((save("llama", room / "m3", num_hidden_layers=3), {}), (model, {"seed": 1}), (model, {"window": 32})):
        with pytest.raises(InputError, match="other settings or another model"):
            assay.profile(other, room / "p", calibration=text, **SMALL | more)
    text.write_text(TEXT.upper())
    with pytest.raises(InputError, match="other settings or another model"):
        assay.profile(model, room / "p", calibration=text, **SMALL)
    (room / "full").mkdir()
    (room / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no profile"):
        assay.profile(model, room / "full", calibration=text, **SMALL)
    assert [path.name for path in (room / "full").iterdir()] == ["notes.txt"] and not list(room.glob(".full*"))


def test_gradients_are_measured_as_far_as_methods_need_them(model: Path, tmp_path: Path) -> None:
    dense = StreamedModel(Checkpoint.open(model))
    experts = StreamedModel(Checkpoint.open(save("mixtral", tmp_path / "experts")))
    sparing = {name: Scope((name,), sparing=True) for name in ("gptq", "two_sided", "squeezellm")}
    assert [sparing["two_sided"].gradients(dense, n).every for n in (8, 256, 511, 1024)] == [1, 1, 1, 4]
    assert Scope(("gptq", "two_sided"), sparing=True).gradients(dense, 1024) == Gradients(4, whole=True)
    assert sparing["gptq"].gradients(dense, 1024) == Gradients(16, whole=False)
    assert Scope(("gptq",), sparing=True, flat=True).gradients(dense, 1024) == Gradients(128, whole=False)
    assert sparing["gptq"].gradients(experts, 1024) == Gradients(1, whole=False)
    assert sparing["two_sided"].gradients(experts, 1024) == ALL_GRADIENTS
    assert Scope(("gptq",)).gradients(dense, 1024) == ALL_GRADIENTS
    assert sparing["squeezellm"].gradients(dense, 1024) == ALL_GRADIENTS  # needs a sum over all tokens


def test_what_a_finished_profile_has_no_prices_of_is_refused(model: Path) -> None:
    settings = {"calibration": model.parent / "text.txt", "window": 16, "tokens": 512}
    made = assay.profile(model, model.parent / "p", **settings)
    assert assay.profile(model, model.parent / "p", **settings).index == made.index
    for more, lacking in (({"levels": ["nf4-g32"]}, "nf4-g32"), ({"methods": ["admm"]}, "admm")):
        with pytest.raises(InputError, match=f"without prices of {lacking}"):
            assay.profile(model, model.parent / "p", **settings, **more)
    known = assay.profile(model, model.parent / "q", **settings, levels=["nf4-g32"])
    assert assay.profile(model, model.parent / "q", **settings, levels=["nf4-g32"]).index == known.index
    assert Profile.open(model.parent / "p").index == made.index


def test_another_calibration_text_of_the_same_name_starts_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model.parent / "text.txt"

    def compress(out: str) -> dict[str, object]:
        made = assay.compress(model, model.parent / out, calibration=text, level="int4-g32-asym", window=16, tokens=512)
        return {k: v for k, v in made.items() if k not in ("out", "seconds", "peak_rss_bytes")}

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("assay.run.hand_over", stopped)
        compress("out")
    text.write_text(TEXT.upper())
    assert compress("out") == compress("fresh")
    weights = [(model.parent / name / "model.safetensors").read_bytes() for name in ("out", "fresh")]
    assert weights[0] == weights[1]


def test_blocks_solved_by_another_profile_are_not_taken(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, room = model.parent / "text.txt", model.parent
    for name, weights in (("plain", "none"), ("weighted", "first-4")):
        assay.profile(model, room / name, calibration=text, window=16, tokens=512, token_weights=weights)

    def compress(out: str, profile: str) -> bytes:
        assay.compress(model, room / out, profile=room / profile, level="int2-g32-asym", method="gptq", engine="plain")
        return (room / out / "model.safetensors").read_bytes()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr("assay.run.hand_over", stopped)
        compress("out", "plain")
    assert compress("out", "weighted") == compress("fresh", "weighted") != compress("other", "plain")
