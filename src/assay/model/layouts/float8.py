"""FP8 weights with their scales: one of the tensor, of each row, or of each block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.model.layouts.base import Headers, Parts, Stored, parts_of

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
INPUT_SCALES = ("input_scale", "activation_scale")
"""Beside weights whose inputs are rounded by a stored scale: no part of their values, but it goes where they go."""


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every FP8 tensor `X` beside which lies `X_scale_inv` or `X_scale`; both are multiplied with."""
    blocks = (config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
    found = {}
    for name, info in stored.items():
        scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in stored), None)
        if info.dtype in FP8 and scale is not None:
            decode = partial(_decode, name, blocks)
            inputs = parts_of(stored, name.removesuffix("weight"), INPUT_SCALES) if name.endswith(".weight") else {}
            found[name] = Stored({"": name, "scale": scale, **inputs}, info.shape, torch.float32, decode, kept=_kept)
    return found


def _kept(parts: Parts) -> torch.dtype:
    mantissas = torch.frexp(parts["scale"].float()).mantissa
    return torch.bfloat16 if bool((mantissas.abs() == 0.5).all()) else torch.float32


def _decode(name: str, blocks: list[int], parts: Parts) -> Tensor:
    return parts[""].float() * spread_blocks(name, parts["scale"].float(), parts[""].shape, blocks)


def spread_blocks(name: str, scale: Tensor, shape: torch.Size, blocks: list[int]) -> Tensor:
    """Scales of a tensor, of its rows or of its blocks, so that they broadcast. Raises InputError where they don't fit."""
    if scale.ndim != 2 or scale.shape == (shape[0], 1):
        return scale
    if list(scale.shape) != [-(-n // b) for n, b in zip(shape, blocks, strict=True)]:
        shapes = f"{list(scale.shape)} scales for {list(shape)} weights"
        raise InputError(f"{name}: {shapes} in blocks of {blocks}; download the model again")
    rows, columns = (min(b, n) for n, b in zip(shape, blocks, strict=True))
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
