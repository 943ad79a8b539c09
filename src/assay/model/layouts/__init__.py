"""Compressed layouts of checkpoints: one file each, which reads it exactly and, where assay writes it, writes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from assay.model.errors import InputError
from assay.model.layouts import awq, compressed_tensors, float8, gptq, mxfp4, own
from assay.model.layouts.base import Headers, Stored, setting
from assay.model.schema import conform

READERS: Mapping[str, Callable[[Mapping[str, Any], Headers], dict[str, Stored]]] = {
    "assay": own.find, "awq": awq.find, "compressed-tensors": compressed_tensors.find, "gptq": gptq.find,
    "mxfp4": mxfp4.find,
}  # fmt: skip
"""By quant_method; all else is read as plain tensors, FP8 with scales beside it included."""


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every logical tensor that lies in the files as several parts. config: of the model. Raises InputError."""
    quantization = config.get("quantization_config") or {}
    conform(
        quantization, dict[str, Any], "config.json: quantization_config is not one that can be read; download the model again"
    )
    method = setting(quantization, "quant_method", str, None)
    if method is not None and method not in READERS and method != "fp8" and _unknown(stored):
        raise InputError(f"config.json: assay doesn't read quant_method {method!r}; it reads {', '.join(sorted(READERS))}, fp8")
    reader = READERS.get(method or "")
    try:
        found = reader(config, stored) if reader else {}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"config.json and the weight files don't belong together as {method} ({reason})") from error
    taken = {part for tensor in found.values() for part in tensor.parts.values()}
    rest = {name: info for name, info in stored.items() if name not in taken}
    return {**found, **own.find_lossless(rest), **float8.find(config, rest)}


def _unknown(stored: Headers) -> bool:
    """Whether integers lie where a weight is expected."""
    return any(name.endswith((".qweight", ".weight_packed", ".weight.absmax")) for name in stored)
