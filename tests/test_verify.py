"""What verify refuses, and what it doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save, text_file

import assay
from assay.measure.text import seen
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError

SMALL = {"window": 16, "tokens": 256}


def compressed(model: Path, **settings: object) -> Path:
    out = model.with_name(f"{model.name}-out")
    assay.compress(model, out, calibration=text_file(model.parent), window=16, tokens=512, level="int4-g32-asym", **settings)
    return out


@pytest.mark.parametrize("turned", [False, True])
def test_models_of_other_shapes_are_not_compared(tmp_path: Path, turned: bool) -> None:
    models = save("llama", tmp_path / "m"), save("llama", tmp_path / "deeper", num_hidden_layers=3)
    one, other = reversed(models) if turned else models
    with pytest.raises(InputError, match="blocks and .* can't be compared"):
        assay.verify(one, other, text=text_file(tmp_path), **SMALL)


def test_windows_are_as_long_as_the_model_has_positions_for(tmp_path: Path) -> None:
    model = save("gpt2", tmp_path / "m")
    assert Checkpoint.open(model).config["n_positions"] < 256
    assert assay.verify(model, model, text=text_file(tmp_path))["kl"]["measured"] == 0


def test_only_the_very_text_of_calibration_is_refused(tmp_path: Path) -> None:
    out, text = compressed(save("llama", tmp_path / "m")), tmp_path / "text.txt"
    with pytest.raises(InputError, match="was calibrated on"):
        assay.verify(out, tmp_path / "m", text=text, **SMALL)
    short = tmp_path / "short.txt"
    short.write_text("a quick jump")
    assert assay.verify(out, tmp_path / "m", text=short, window=8)["tokens"] == 8


def test_evaluation_parts_of_data_sets_are_not_what_calibration_saw(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save("llama", tmp_path / "m"))
    facts = {"source": "builtin:calibration", "digest": "", "pool": 256, "window": 16, "picked": []}
    assert not seen(checkpoint, facts, 64, "builtin") and not seen(checkpoint, facts, 64, "some/data-set")


def test_numbers_too_large_for_float16_are_named_and_nothing_is_noted(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    large = {n: (t * 2e9 if "down_proj" in n else t).to(torch.bfloat16) for n, t in tensors.items()}
    save_file(large, model / "model.safetensors", {"format": "pt"})
    out = compressed(model, engine="plain")
    with pytest.raises(InputError, match="too large for float16"):
        assay.verify(out, model, text=out.parent / "m" / "config.json", compute="float16", **SMALL)
    assert not (out / "assay" / "verdict.json").exists()
