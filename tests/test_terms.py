"""Formats with exact weights, low-rank terms, signs and vectors go through the whole job and are reopened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save, text_file
from transformers import AutoModelForCausalLM

import assay
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level

SMALL = {"tokens": 1024, "window": 32}
CASES = [
    ("squeezellm", "lut3-channel+sparse0.0045"), ("easy_quant", "int4-channel-sym+sparse0.005"),
    ("gwq", "int4-g32-asym+sparse0.01"), ("lorc", "int4-g32-asym+rank4"),
    ("pb_llm", "salient2.4-g32"), ("vptq", "vector2-channel"), ("bit_planes", "planes4-g32"),
    ("ggml", "q4_1"), ("gptq", "iq4_nl"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "level"), CASES)
def test_what_was_meant_is_what_the_files_hold(tmp_path: Path, method: str, level: str) -> None:
    model, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    report = assay.compress(model, tmp_path / "out", method=method, level=level, engine="assay", calibration=text, **SMALL)
    assert report["ledger"]["done"] == report["ledger"]["planned"] > 0
    result = Checkpoint.open(tmp_path / "out")
    assert set(result.levels.values()) == {Level.parse(level)}
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, own in result.levels.items():
        weight = original.get_parameter(name).data
        assert result.nbytes(name) == own.nbytes(*weight.shape, result.dtype(name).itemsize)
        assert 0 < float((result.read(name).float() - weight).norm()) < 0.7 * float(weight.norm())
    loaded = assay.load(tmp_path / "out").eval()
    for name in result.levels:
        assert torch.equal(loaded.get_submodule(name.removesuffix(".weight")).weight, result.read(name))


def test_a_profile_without_what_the_method_reads_is_refused(tmp_path: Path) -> None:
    model, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    assay.profile(model, tmp_path / "p", calibration=text, levels=["lut3-channel"], **SMALL)
    with pytest.raises(InputError, match="holds no fisher; run assay profile with --method squeezellm"):
        assay.compress(model, tmp_path / "out", method="squeezellm", level="lut3-channel", engine="assay", profile=tmp_path / "p")


@pytest.mark.parametrize(
    ("method", "level"), [("gptq", "int3-g32-asym+sparse0.01"), ("gptq", "int3-g32-asym+rank2"), ("nested", "int4-g32-asym")]
)
def test_a_term_that_the_method_lacks_is_refused_with_those_that_have_it(tmp_path: Path, method: str, level: str) -> None:
    with pytest.raises(InputError, match=f"{method} does not make {level.replace('+', '.')}; these do: .*"):
        assay.compress(save("llama", tmp_path / "m"), tmp_path / "out", method=method, level=level, engine="assay")
