"""What engines load as one matrix must share what that matrix has once: NVFP4's unit of the scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch

from assay.model.errors import ShortfallError
from assay.model.layouts.gptq import FUSED
from assay.model.level import Level
from assay.model.packed import Packed, PackedTable

Loaders = Mapping[str, Callable[[], Packed]]


def siblings(names: Iterable[str]) -> list[list[str]]:
    """Weights that engines stack into one matrix, by the names that they know (q, k, v; gate, up)."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf in FUSED:
            found.setdefault(f"{parent}.{FUSED[leaf]}", []).append(name)
    return [group for group in found.values() if len(group) > 1]


def share_units(packed: Loaders, levels: Mapping[str, Level]) -> Loaders:
    """Loaders that give NVFP4 weights of one stacked matrix the same unit; values stay. Others are left alone."""
    changed = dict(packed)
    for group in siblings(n for n, x in levels.items() if x.format == "nvfp"):
        units = [weight.global_scale for n in group if isinstance(weight := packed[n](), PackedTable)]
        unit = torch.stack([u for u in units if u is not None]).amax(0)
        changed |= {n: partial(_in_unit, n, packed[n], unit) for n in group}
    return changed


def _in_unit(name: str, load: Callable[[], Packed], unit: torch.Tensor) -> Packed:
    weight = load()
    assert isinstance(weight, PackedTable) and weight.scale is not None and weight.global_scale is not None
    scale = (weight.scale.float() * (weight.global_scale / unit)).to(weight.scale.dtype)
    moved = replace(weight, scale=scale, global_scale=unit)
    if not torch.equal(moved.decode(), weight.decode()):
        raise ShortfallError(f"{name}: its NVFP4 scales are too small beside those of the matrices that vLLM joins it with")
    return moved
