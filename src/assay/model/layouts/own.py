"""Assay's own layout, and bf16 tensors packed without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from assay.model.dfloat11 import PARTS, PackedBfloat16
from assay.model.errors import InputError
from assay.model.ggml import KINDS
from assay.model.layouts.base import Headers, Parts, Stored, modules, packed, parts_of
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.terms import SUFFIXES, restore


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every weight that quantization_config lists; its shape is a stored part, except for ggml's blocks."""
    weights = config["quantization_config"]["weights"]
    found = {}
    for module in modules(stored, "weight_packed"):
        name = f"{module}weight"
        if name not in weights:
            raise InputError(f"config.json gives no quantization scheme for {name}")
        facts = weights[name]
        level, dtype = Level.parse(str(facts["level"])), torch_dtype(str(facts["dtype"]))
        turned, shape = bool(facts.get("transposed")), None
        if level.name in KINDS:
            rows, nbytes = stored[f"{module}weight_packed"].shape
            shape, dtype = (rows, KINDS[level.name].columns(nbytes))[:: -1 if turned else 1], torch.float32

        def read(parts: Parts, level: Level = level, dtype: torch.dtype = dtype) -> Packed:
            return restore(parts, level, dtype)

        found[name] = packed(parts_of(stored, module, SUFFIXES), shape, dtype, level, read, turned)
    return found


def find_lossless(stored: Headers) -> dict[str, Stored]:
    """Every tensor that is stored as `PackedBfloat16`."""
    found = {}
    for module in modules(stored, PARTS[0]):
        if module + PARTS[1] in stored:
            found[module.removesuffix(".")] = Stored(
                parts_of(stored, module, PARTS), None, torch.bfloat16, lambda p: PackedBfloat16.from_tensors(p).decode()
            )
    return found


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by its name. Raises InputError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"config.json names the dtype {name!r}, which torch doesn't have")
    return dtype
