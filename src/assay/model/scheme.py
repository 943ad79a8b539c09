"""What config.json says of quantized weights: compressed-tensors' scheme, or assay's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import TypedDict

from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.schema import conform

NO_SCHEME = "quantization_config is not one that can be read; download the model again"


class OwnWeight(TypedDict):
    """What config.json says of a weight in assay's own layout. transposed: the model has it [in, out]."""

    level: str
    dtype: str
    transposed: bool


def packed_levels(config: dict[str, Any]) -> dict[str, Level]:
    """Level of every module that `quantization_config` names outright (as our writer does)."""
    quantization = config.get("quantization_config") or {}
    conform(quantization, dict[str, Any], f"config.json: {NO_SCHEME}")
    if quantization.get("quant_method") != "compressed-tensors":
        return {}
    try:
        return _levels_of(quantization)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"config.json: {NO_SCHEME} ({type(error).__name__}: {error})") from error


def _levels_of(quantization: Mapping[str, Any]) -> dict[str, Level]:
    levels = {}
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("type") != "int":
            continue
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        level = Level(int(weights["num_bits"]), size, bool(weights["symmetric"]))
        levels.update(dict.fromkeys(group.get("targets", []), level))
    return levels


def own_weights(config: dict[str, Any]) -> dict[str, OwnWeight]:
    """Facts of every weight in assay's own layout."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "assay":
        return {}
    conform(quantization.get("weights"), dict[str, OwnWeight], f"config.json: {NO_SCHEME}")
    return dict(quantization["weights"])


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by its name in torch. Raises InputError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"config.json names the dtype {name!r}, which torch doesn't have")
    return dtype
