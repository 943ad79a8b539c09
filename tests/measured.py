"""Weights and statistics of one block of the trained model pebble, for tests that compare methods on real weights."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from assay.measure.damage import Curvature
from assay.measure.profile import WEIGHTWISE, Curvatures, measure
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.methods.base import Statistics, get
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.progress import Silent

BLOCK = 2


@cache
def pebble_block(token_weights: str = "none") -> dict[str, tuple[Tensor, Curvature]]:
    """Weight [out, in] and curvature of every linear map of block 2, from 4,096 tokens; skips where pebble is absent."""
    folders = [parent / "shared" for parent in Path(__file__).resolve().parents]
    shared = next((f for f in folders if (f / "models/pebble/config.json").exists()), None)
    if shared is None:
        pytest.skip("shared/models/pebble is not here")
    streamed = StreamedModel(Checkpoint.open(shared / "models/pebble"))
    text = windows(streamed.checkpoint, shared / "data/wikitext2/valid.txt", "calibration", 4096, 256, streamed.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        measure(streamed, text, Path(folder), 0, Silent(), WEIGHTWISE, token_weights)
        found = Curvatures(Path(folder), BLOCK, text.tokens, WEIGHTWISE)
        return {name: (streamed.checkpoint.read(name).float(), curvature) for name, curvature in found.items()}


def statistics(curvature: Curvature) -> Statistics:
    """All of them, as a batch of one."""
    parts = (curvature.h, curvature.g, curvature.gradient, curvature.fisher)
    return Statistics(*(p[None] if p is not None else None for p in parts))


def encode(name: str, level: str, weight: Tensor, curvature: Curvature, **options: object) -> Packed:
    """One matrix by a method that gets what it needs, stored in bf16."""
    return get(name)(**options).encode(weight[None], Level.parse(level), torch.bfloat16, statistics(curvature))[0]


def damage(name: str, level: str, **options: object) -> float:
    """Nats per token of the whole block treated by a method."""
    total = 0.0
    for weight, curvature in pebble_block().values():
        total += curvature.damage(encode(name, level, weight, curvature, **options).decode().float() - weight)
    return total
