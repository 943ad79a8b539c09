"""Polishing a whole model: scales that can be tuned, a gradient that is right, and a result that is never worse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WRITTEN
from lively import enliven
from tiny import save_tokenizer, text_file
from transformers import AutoConfig, AutoModelForCausalLM

import assay
from assay import polish as polishing
from assay.engines import load
from assay.execute import Results, Solved
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows
from assay.methods import base
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import Packed, TunablePacked
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare

TUNED = [
    ("nearest", "int3-g32-asym"), ("nearest", "int4-channel-sym"), ("nearest", "nf3-g32"), ("trellis", "trellis2.25-channel"),
    ("lorc", "int4-g32-asym+rank4"), ("easy_quant", "int4-channel-sym+sparse0.005"),
]  # fmt: skip
LOW_RANK = [("lorc", "mxfp4-g32+rank4"), ("svd_quant", "int3-g32-asym+rank2")]
FIXED = [("nearest", "mxfp4-g32"), ("nearest", "nvfp4-g16"), ("nested", "planes4-g32"), ("vptq", "vector2-channel")]
MAKERS = {"planes": "bit_planes"}
SMALL: dict[str, Any] = {"tokens": 1024, "window": 32}


def packed(method: str, level: str, dtype: torch.dtype = torch.bfloat16) -> Packed:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 48, 64, generator=generator)
    wanted = Level.parse(level)
    moment = torch.eye(64)[None]
    made = base.get(MAKERS.get(wanted.format, method))()
    return made.encode(weight, wanted, dtype, base.Statistics(h=moment, g=torch.eye(48)[None]))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("method", "level"), TUNED + LOW_RANK)
def test_tunable_scales_decode_to_what_is_stored_and_come_back_bit_for_bit(method: str, level: str, dtype: torch.dtype) -> None:
    found = packed(method, level, dtype)
    assert isinstance(found, TunablePacked)
    tunable = found.tunable()
    assert tunable is not None
    scales, unit, decode, _ = tunable
    assert unit.shape == scales.shape and (unit != 0).all()
    assert scales.dtype is torch.float32
    again = found.with_numbers(scales).tensors()
    assert all(torch.equal(t, again[name]) for name, t in found.tensors().items())
    changed = (scales * 1.07).to(dtype).float()
    other = found.with_numbers(scales * 1.07)
    assert other.nbytes == found.nbytes
    for numbers, meant in ((scales, found), (changed, other)):
        stored, eps = meant.decode().float(), torch.finfo(dtype).eps
        far = eps * float(stored.abs().max()) if meant.level.rank else 2e-6  # the codes' part is rounded before the sum
        torch.testing.assert_close(decode(numbers), stored, rtol=1.01 * eps, atol=far)


@pytest.mark.parametrize(("method", "level"), TUNED + LOW_RANK)
def test_the_gradient_reaches_every_scale(method: str, level: str) -> None:
    found = packed(method, level)
    assert isinstance(found, TunablePacked)
    scales, _, decode, _ = found.tunable() or pytest.fail("not tunable")
    leaf = scales.clone().requires_grad_()
    decode(leaf).square().sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad != 0).all()


@pytest.mark.parametrize(("method", "level"), FIXED)
def test_forms_without_scales_in_the_models_dtype_say_so(method: str, level: str) -> None:
    found = packed(method, level)
    assert not isinstance(found, TunablePacked) or found.tunable() is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lively llama, its text, profile and results with and without polish."""
    folder = tmp_path_factory.mktemp("polish")
    enliven("llama", folder / "m")
    save_tokenizer(folder / "m")
    text_file(folder)
    assay.profile(folder / "m", folder / "p", calibration=folder / "text.txt", **SMALL)
    compress(folder, "polished", polish=5)
    compress(folder, "rough")
    return folder


def compress(folder: Path, out: str, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"bits": 3.5, "engine": "assay", "profile": folder / "p"} | options
    return assay.compress(folder / "m", folder / out, **given)


def recipe(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "assay" / "recipe.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.html")  # its title is the folder
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_low_rank_terms_are_tuned_too(made: Path) -> None:
    given = {"bits": None, "level": "int2-g32-asym+rank4", "method": "lorc", "profile": None, "calibration": made / "text.txt"}
    compress(made, "factors", polish=0.5, **given, **SMALL)
    compress(made, "rough factors", **given, **SMALL)
    told = recipe(made / "factors")["polish"]
    assert told["used"] and told["after"] < 0.97 * told["before"]
    before, after = (Checkpoint.open(made / name) for name in ("rough factors", "factors"))
    stored = [dict(c.iter_raw(c.stored)) for c in (before, after)]
    changed = [n for n in stored[0] if not torch.equal(stored[0][n], stored[1][n])]
    for ending in ("weight_scale", "weight_low_rank_in", "weight_low_rank_out"):
        assert any(n.endswith(ending) for n in changed)
    assert not any(n.endswith(("weight_packed", "weight_zero_point")) for n in changed)


def held_out_kl(folder: Path, out: str) -> float:
    model, result = (StreamedModel(Checkpoint.open(folder / name)) for name in ("m", out))
    ids = torch.tensor(Profile.open(folder / "p").index["held_out"])
    found = compare(model, {"out": Candidate(result)}, Windows(ids, "held out"), Silent())["out"]
    return float(torch.cat(found.kl).double().mean())


def test_it_lowers_the_kl_on_held_out_text_to_what_the_recipe_says(made: Path) -> None:
    told = recipe(made / "polished")["polish"]
    assert told["used"]
    assert told["after"] < 0.97 * told["before"]
    assert held_out_kl(made, "rough") == pytest.approx(told["before"], rel=1e-3)
    assert held_out_kl(made, "polished") == pytest.approx(told["after"], rel=1e-3)
    promised = [recipe(made / out)["predicted"]["kl"] for out in ("rough", "polished")]
    assert promised[1] / promised[0] == pytest.approx(told["after"] / told["before"])


def test_the_ledger_names_every_tuned_tensor_and_adds_up(made: Path) -> None:
    source, rough, result = (Checkpoint.open(made / name) for name in ("m", "rough", "polished"))
    rows = {row["tensor"]: row for row in json.loads((made / "polished" / "assay" / "ledger.json").read_text())}
    assert sum(row["bytes_after"] for row in rows.values()) == sum(info.nbytes for info in result.stored.values())
    assert {n for n in rows if not torch.equal(rough.read(n), result.read(n))} >= set(result.levels)
    for name in set(source.names) - set(result.levels):
        changed = not torch.equal(source.read(name), result.read(name))
        assert changed == (len(source.shape(name)) == 1)
        assert (rows[name]["reason"] == "polished") == changed
        assert source.dtype(name) == result.dtype(name)
    loaded = load.load(made / "polished")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.data, result.read(name))


def test_what_does_not_help_is_dropped_and_said_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polishing, "RATE", 30.0)
    report = compress(made, "dropped", polish=5)
    told = recipe(made / "dropped")["polish"]
    assert not told["used"]
    assert told["after"] == told["before"]
    assert "didn't lower" in report["sentence"]
    weights = "model.safetensors"
    assert digests(made / "dropped")[weights] == digests(made / "rough")[weights]


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_a_run_cut_off_ends_with_the_same_bytes(made: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    real, left = polishing.save_tensors, [stop]

    def cut(*given: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(polishing, "save_tensors", cut)
        with pytest.raises(KeyboardInterrupt):
            compress(made, f"cut{stop}", polish=5)
    monkeypatch.setattr(polishing, "PASSES", 1)  # the number of steps was settled by the first call
    compress(made, f"cut{stop}", polish=5)
    assert digests(made / f"cut{stop}") == digests(made / "polished")


def test_the_gradient_is_that_of_the_kl(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(Checkpoint.open(made / "m"))
    result = Checkpoint.open(made / "rough")

    class Stored(Results):
        def __init__(self) -> None:
            self.solved = {n: Solved(n, x.name, "", 0.0, "float32") for n, x in result.levels.items()}

        def packed(self, site: str) -> Packed:
            return result.read_packed(site)

    with model.whole():
        tuning = polishing.Tuning(model, Stored())
        assert {knob.name for knob in tuning.knobs} >= {n for n in result.names if n.endswith("norm.weight")}
        ids = torch.tensor(Profile.open(made / "p").index["held_out"])
        monkeypatch.setattr(polishing, "LOGITS_AT_ONCE", 64 * 32 * 3)
        text = polishing.Text(tuning, ids, cached=False)
        assert len(text.pieces) > 1
        assert text.batches == 1
        d = 0.02 * torch.randn(tuning.size, generator=torch.Generator().manual_seed(0))
        gradient = text.gradient(0, d)
        direction = gradient / gradient.norm()
        ends = [text.mean_kl(tuning.weights(d + sign * 1e-2 * direction)) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "bloom"])
def test_other_families_end_at_the_kl_that_is_told(tmp_path: Path, family: str) -> None:
    enliven(family, tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    assay.profile(tmp_path / "m", tmp_path / "p", calibration=text_file(tmp_path), **SMALL)
    compress(tmp_path, "out", polish=5)
    told = recipe(tmp_path / "out")["polish"]
    assert told["after"] < told["before"]
    assert held_out_kl(tmp_path, "out") == pytest.approx(told["after"], rel=1e-3)


def test_a_model_with_nothing_to_tune_stays_as_it_is(tmp_path: Path) -> None:
    text, config = text_file(tmp_path), AutoConfig.for_model("olmo", **WRITTEN["llama"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    settings = {"calibration": text, "window": 16, "tokens": 512, "level": "mxfp4-g32", "method": "nearest", "engine": "assay"}
    assay.compress(tmp_path / "m", tmp_path / "out", polish=0.02, **settings)
    told = recipe(tmp_path / "out")["polish"]
    assert not told["used"] and told["tuned"] == told["steps"] == 0 and told["before"] == told["after"]


def test_new_text_is_drawn_from_what_the_original_predicts() -> None:
    ids = torch.zeros(1, 20_001, dtype=torch.long)
    p = torch.tensor([0.0, 0.2, 0.8])
    drawn = polishing._resampled(ids, p.log().expand(1, 20_001, 3), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[0, 1:], minlength=3) / 20_000
    expected = polishing.RESAMPLED * p + (1 - polishing.RESAMPLED) * torch.eye(3)[0]
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    sure = torch.eye(3).log()[[1, 2, 1, 0]][None]
    kept = polishing._resampled(torch.tensor([[0, 1, 2, 1]]), sure, torch.Generator().manual_seed(0))
    assert kept.tolist() == [[0, 1, 2, 1]]


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_no_time_is_refused_before_anything_is_written(made: Path, minutes: float) -> None:
    with pytest.raises(InputError, match="--polish .*above zero"):
        compress(made, "never", polish=minutes)
    assert not (made / ".never.assay").exists()


def test_too_little_memory_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polishing.memory, "available", lambda: 1_000)
    with pytest.raises(InputError, match="holds the whole model.*leave it out"):
        compress(made, "never", polish=1)
    assert not (made / ".never.assay").exists()
