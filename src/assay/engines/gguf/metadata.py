"""What a GGUF file says about the model itself: sizes, rotary positions, attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from gguf import GGUFValueType, GGUFWriter
from torch import Tensor

from assay.model.errors import InputError
from assay.model.gguf_layout import facts, family, settings, yarn_magnitude

FLOATS = ("epsilon", "freq_base", "softcapping", "factor")
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
"""Settings of yarn that llama.cpp takes for granted."""


def add_model(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Architecture and hyperparameters. Raises InputError for a way of scaling positions that llama.cpp lacks."""
    own, found, arch = family(config), settings(config), str(writer.arch)
    table = facts()["metadata"]
    table = {key: table[key] for key in own.get("keys", table)} | own.get("metadata", {})
    for key, name in table.items():
        value = found.get(name)
        if value is None:
            continue
        if key == "context_length" and own.get("windowed"):  # llama.cpp would attend to all of a longer text
            value = min(value, found.get("sliding_window") or value)
        if key.endswith(FLOATS):
            writer.add_float32(f"{arch}.{key}", float(value))
        else:
            writer.add_uint32(f"{arch}.{key}", int(value))
    for key, value in rope_scaling(found).items():
        kind = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}[type(value)]
        writer.add_key_value(f"{arch}.rope.scaling.{key}", value, kind)


def rope_scaling(found: Mapping[str, Any]) -> dict[str, Any]:
    """Keys below `rope.scaling`, for types that need any."""
    rope = found["rope"]
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"type": "linear", "factor": float(rope["factor"])}
    original = int(rope.get("original_max_position_embeddings") or found.get("original_max_position_embeddings") or 0)
    if kind == "yarn":
        return {"type": "yarn", "factor": float(rope["factor"]), "original_context_length": original} | _yarn_attention(rope)
    if kind == "longrope":
        ratio = found["max_position_embeddings"] / original
        scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
        return {"attn_factor": float(rope.get("attention_factor") or scale)}
    raise InputError(f"llama.cpp has no rotary positions of type {kind!r}; --engine assay keeps them")


def _yarn_attention(rope: Mapping[str, Any]) -> dict[str, float]:
    """The factor of attention beside the one that llama.cpp takes itself. Raises InputError for what has no such key."""
    for key, usual in YARN.items():
        if rope.get(key) not in (usual, None):
            raise InputError(f"llama.cpp's rotary positions of type 'yarn' have {key} {usual}; this model has {rope[key]}")
    factor = rope.get("attention_factor")
    return {} if factor is None else {"attn_factor": float(factor) / yarn_magnitude(float(rope["factor"]))}


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the frequencies of the rotary positions are divided by, float32 [channels / 2], where that is not 1.

    llama3: Llama 3.1 (2024); longrope: LongRoPE (2024).
    """
    found = settings(config)
    rope = found["rope"]
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {f"rope_factors_{n}.weight": torch.tensor(rope[f"{n}_factor"], dtype=torch.float32) for n in ("long", "short")}
    if kind != "llama3":
        return {}
    size = found["rotary_dim"]
    waves = 2 * math.pi * found["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope["original_max_position_embeddings"] / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - share) / factor + share)).float()}
