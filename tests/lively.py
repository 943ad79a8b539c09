"""Tiny models in which every tensor matters, and made-up statistics for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import build
from torch import Tensor
from transformers import PreTrainedModel

from assay.measure.damage import Curvature
from assay.measure.profile import Profile
from assay.model.checkpoint import Checkpoint
from assay.model.progress import Silent
from assay.model.sites import Site, survey
from assay.transforming import transform


@dataclass(frozen=True)
class Lively:
    """A tiny model with large random weights, gains and biases, on disk and running."""

    model: PreTrainedModel
    folder: Path
    logits: Tensor


def enliven(family: str, folder: Path, **changes: Any) -> Lively:
    """A model of the family saved in `folder`; the same weights every time."""
    _, model = build(family, **changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        size = 0.3 if parameter.ndim == 1 else 0.15 if "embed" in name or ".wte" in name else 1.5 / parameter.shape[-1] ** 0.5
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return Lively(model, folder, logits(model))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Outputs for some fixed input."""
    generator = torch.Generator().manual_seed(2)
    if hasattr(model.config, "patch_size"):
        return model(pixel_values=torch.randn(3, 3, 16, 16, generator=generator)).logits
    return model(input_ids=torch.randint(3, 60, (3, 12), generator=generator)).logits


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def transformed(given: Lively, names: list[str], out: Path, seed: int = 0) -> PreTrainedModel:
    """The model as transformers loads it after transforms, which read made-up statistics."""
    source = Checkpoint.open(given.folder)
    transform(source, names, out, Made(given.folder, {"model": source.fingerprint}), seed, Silent())
    return type(given.model).from_pretrained(out, dtype=torch.float32)


class Made(Profile):
    """A profile of made-up statistics: it needs no text, and every family has one."""

    def curvatures(self, block: int | None) -> Mapping[str, Curvature]:
        return _made(self.folder, block)


def moment(size: int, seed: int) -> Tensor:
    """A second moment [size, size] whose diagonal spans two decades and more."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * size, size, generator=generator) * torch.rand(size, generator=generator).mul(6).exp()
    return x.T @ x / len(x)


@cache
def _made(folder: Path, block: int | None) -> Mapping[str, Curvature]:
    found = {}
    for place, site in enumerate(s for s in _sites(folder) if s.block == block):
        h = moment(site.shape[1], sum(map(ord, site.reads)))
        found[site.name] = Curvature(h, moment(site.shape[0], place), 1.0, 100)
    return found


@cache
def _sites(folder: Path) -> list[Site]:
    return list(survey(Checkpoint.open(folder)).sites.values())
