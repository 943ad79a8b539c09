"""Every transform on every family: the function stays, or the model is refused with the reason; half a fold is noticed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from lively import Lively, difference, enliven, logits, transformed
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods import base
from assay.model.errors import InputError
from assay.transforming import parse

NAMES = base.names("transform")
REFUSED = {
    ("rotate", "gemma2"): "post_attention_layernorm", ("rotate", "gemma3_text"): "post_attention_layernorm",
    ("rotate", "bloom"): "word_embeddings_layernorm", ("rotate", "bert"): "normalises the residual stream itself",
    ("klt_rotate", "gemma2"): "post_attention_layernorm", ("klt_rotate", "gemma3_text"): "post_attention_layernorm",
    ("klt_rotate", "bloom"): "word_embeddings_layernorm", ("klt_rotate", "bert"): "normalises the residual stream itself",
    ("klt_rotate", "gpt2"): "LayerNorm", ("klt_rotate", "opt"): "LayerNorm", ("klt_rotate", "gpt_neox"): "LayerNorm",
    ("klt_rotate", "falcon"): "LayerNorm", ("klt_rotate", "vit"): "LayerNorm",
    ("norm_fold", "bert"): "normalises the residual stream itself", ("rotate_heads", "mamba"): "no attention values",
}  # fmt: skip
"""Words of the reason, where a transform can't be exact."""

KEY_BIAS = ("k_proj.bias", "key.bias")
"""Without a rotary embedding it shifts all scores of a query alike, so that the softmax hides whatever it is."""


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> Lively, made once."""

    @cache
    def make(family: str) -> Lively:
        return enliven(family, tmp_path_factory.mktemp(family))

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_and_half_a_fold_is_noticed(name: str, family: str, lively: Any, tmp_path: Path) -> None:
    given = lively(family)
    if (name, family) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, family]) as caught:
            transformed(given, [name], tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return
    changed = transformed(given, [name], tmp_path / "out")
    assert difference(logits(changed), given.logits) < 1e-5
    before, after = given.model.state_dict(), changed.state_dict()
    kinds: dict[str, list[str]] = {}
    for parameter in (n for n in after if n in before and not torch.equal(before[n], after[n])):
        kinds.setdefault(re.sub(r"\d+", "*", parameter), []).append(parameter)
    assert len(kinds) > 1, "a fold has two sides"
    for kind in kinds.keys() - {k for k in kinds if k.endswith(KEY_BIAS)}:
        assert difference(without(changed, kinds[kind], before), given.logits) > 0.01, kind


def without(changed: PreTrainedModel, parameters: list[str], before: Mapping[str, Tensor]) -> Tensor:
    """Logits when some parameters are left as they were."""
    after = changed.state_dict()
    kept = {parameter: after[parameter].clone() for parameter in parameters}
    for parameter in parameters:
        after[parameter].copy_(before[parameter])
    found = logits(changed)
    for parameter in parameters:
        after[parameter].copy_(kept[parameter])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_states_its_facts(name: str) -> None:
    found = parse(name)
    method = type(found)
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert found.verb == "transform"
    assert set(found.needs) <= {"H", "G"}
    assert found.paper
    assert method.__doc__
    assert found == parse(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_everything_and_no_other_tensor_is_written(name: str, lively: Any, tmp_path: Path) -> None:
    given = lively("llama")
    files = []
    for place, seed in enumerate((0, 0, 1)):
        transformed(given, [name], tmp_path / str(place), seed)
        files.append(load_file(tmp_path / str(place) / "model.safetensors"))
    assert files[0].keys() == load_file(given.folder / "model.safetensors").keys()
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])
    random = name in ("rotate", "rotate_heads", "klt_rotate")
    assert any(not torch.equal(files[0][n], files[2][n]) for n in files[0]) is random
