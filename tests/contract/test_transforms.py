"""Every transform on every family: the function stays, or the model is refused with the reason; half a fold is noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor
from transformers import PreTrainedModel

from assay.measure.damage import Curvature
from assay.measure.profile import Profile, key_of
from assay.methods import base
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.model.sites import survey
from assay.transforming import parse, transform

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


@dataclasses.dataclass(frozen=True)
class Lively:
    """A tiny model in which every tensor matters, on disk and running."""

    model: PreTrainedModel
    folder: Path
    logits: Tensor


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> Lively, made once."""

    @cache
    def make(family: str) -> Lively:
        _, model = build(family)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                changed = parameter.data + 0.3 * noise if "norm" in name.lower() or ".ln_" in name else parameter.data + 0.2 * noise
            else:
                changed = parameter.data + noise * (0.5 if "embed" in name or ".wte" in name else 1.5 / parameter.shape[-1] ** 0.5)
            parameter.data = changed
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return Lively(model, folder, logits(model))

    return make


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if hasattr(model.config, "patch_size"):
        return model(pixel_values=torch.randn(3, 3, 16, 16, generator=generator)).logits
    return model(input_ids=torch.randint(3, 60, (3, 12), generator=generator)).logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


class Made(Profile):
    """A profile of made-up statistics: no text, and every family has one."""

    def curvatures(self, block: int | None) -> Mapping[str, Curvature]:
        checkpoint = Checkpoint.open(self.folder)
        found = {}
        for place, site in enumerate(s for s in survey(checkpoint).sites.values() if s.block == block):
            h = moment(site.shape[1], sum(map(ord, site.reads)))
            found[key_of(site)] = Curvature(h, moment(site.shape[0], place), 1.0, 100)
        return found


def moment(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * size, size, generator=generator) * torch.rand(size, generator=generator).mul(6).exp()
    return x.T @ x / len(x)


def run(name: str, given: Lively, out: Path, seed: int = 0) -> PreTrainedModel:
    source = Checkpoint.open(given.folder)
    profile = Made(given.folder, {"model": source.fingerprint})
    transform(source, [name], out, profile, seed, Silent())
    return type(given.model).from_pretrained(out)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_and_half_a_fold_is_noticed(name: str, family: str, lively: Any, tmp_path: Path) -> None:
    given = lively(family)
    if (name, family) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name, family]) as caught:
            run(name, given, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return
    changed = run(name, given, tmp_path / "out")
    d = difference(logits(changed), given.logits)
    print(name, family, f"{d:.2e}")
    assert d < 1e-5
    before, after = given.model.state_dict(), changed.state_dict()
    odd = [n for n in after if n in before and not torch.equal(before[n], after[n])]
    assert odd
    for n in odd:
        t = after[n].clone()
        after[n].copy_(before[n])
        e = difference(logits(changed), given.logits)
        if e < 0.01: print("   control", n, f"{e:.2e}")
        after[n].copy_(t)
