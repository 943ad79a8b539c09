"""Scales that engines store beside the weights, from the largest numbers that the calibration text made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from assay.engines.contract import Contract
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.errors import InputError
from assay.model.layouts.compressed_tensors import CACHE_SCALES, cache_scale, input_scale
from assay.model.level import Level

STATIC = "compressed-tensors-w8a8-static"
FP8_CACHE = "fp8"
KEYS = ("attn.k", "attn.qkv")
"""Roles of the matrices that make keys; the scales of a cache lie beside them."""


def calibrated(
    model: StreamedModel, profile: Profile, contract: Contract, levels: Mapping[str, Level], cache: str | None
) -> dict[str, Tensor]:
    """Tensors [1], float32, by name: `input_scale` of layers whose inputs are rounded by a stored scale, and for a cache in
    fp8 `k_scale` and `v_scale` of each attention.

    levels: of the compressed weights; cache: how keys and values will be stored. Empty where the engine's files hold no
    such scales. Raises InputError for a profile that lacks what they are made from.
    """
    found: dict[str, Tensor] = {}
    if contract.layout == STATIC:
        found |= _inputs(model, profile, levels)
    if FP8_CACHE in (cache or "") and contract.layout.startswith("compressed-tensors"):
        found |= _caches(model, profile)
    return found


def _inputs(model: StreamedModel, profile: Profile, levels: Mapping[str, Level]) -> dict[str, Tensor]:
    sites = [site for site in model.anatomy.sites.values() if site.name in levels]
    measured = {block: profile.curvatures(block) for block in {site.block for site in sites}}
    return {f"{s.module}.input_scale": input_scale(measured[s.block].largest(s.name), levels[s.name]) for s in sites}


def _caches(model: StreamedModel, profile: Profile) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for block in range(len(model.blocks)):
        home = next((s.module.rpartition(".")[0] for s in model.anatomy.block_sites(block) if s.role in KEYS), None)
        largest = profile.curvatures(block).largest_cached()
        if largest is None and home is not None:
            raise InputError(f"{profile.folder} does not say how large keys and values are; run assay profile again")
        if largest is not None and home is not None:
            found |= {home + suffix: cache_scale(value) for suffix, value in zip(CACHE_SCALES, largest, strict=True)}
    return found
