"""Memory of a served model: weights, cache, working memory and the engine's own, at a stated context and batch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from assay.engines.serving import SERVERS, CacheType, Server, server
from assay.measure.footprint import Footprint
from assay.model.errors import InputError

WORK_ITEMSIZE = 2
LOGITS_ITEMSIZE = 4
DEFAULT_CACHE = "fp16"


@dataclass(frozen=True)
class Load:
    """What is served at once. context: tokens of each sequence; batch: sequences; cache: how keys and values are stored."""

    context: int
    batch: int = 1
    cache: str = DEFAULT_CACHE


def parse_tokens(text: str | int) -> int:
    """Tokens of "32k" (1024 each), "1M" or a plain number. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", str(text))
    value = int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else 0
    if value < 1:
        raise InputError(f"--context {text}: give a number of tokens above zero, like 8192 or 32k (k is 1024)")
    return value


def overheads(footprint: Footprint, load: Load, engine: str) -> dict[str, int]:
    """Bytes beside the weights: cache, activations, engine. Raises InputError for what the model or engine hasn't."""
    if footprint.unknown:
        raise InputError(f"{footprint.unknown}, so neither is its cache; give --size instead of --memory and --context")
    if footprint.context is not None and load.context > footprint.context:
        raise InputError(f"--context {load.context} is more than the {footprint.context} tokens that this model reads")
    by = server(engine)
    kept = by.cache(load.cache, engine)
    return {
        "cache": cache_bytes(footprint, load, by, kept), "activations": activation_bytes(footprint, load, by),
        "engine": by.overhead,
    }  # fmt: skip


def cache_bytes(footprint: Footprint, load: Load, by: Server, kept: CacheType) -> int:
    """Bytes of keys and values of all sequences at their full length.

    A layer with a window keeps so many tokens only; lengths are rounded up to the engine's pages.
    """
    total = 0
    for layer in footprint.layers:
        tokens = min(load.context, layer.window or load.context)
        elements = footprint.latent if by.latent and footprint.latent else layer.keys + layer.values
        total += math.ceil(by.page * math.ceil(tokens / by.page) * elements * kept.bits / 8) + layer.state
    return total * load.batch


def activation_bytes(footprint: Footprint, load: Load, by: Server) -> int:
    """Bytes of the widest moment of a step: the residual stream and its copy, both halves of the MLP, and the logits."""
    tokens = min(by.at_once or load.context * load.batch, load.context * load.batch)
    inside = WORK_ITEMSIZE * tokens * (4 * footprint.hidden + 3 * footprint.intermediate)
    rows = tokens if by.logits == "token" else load.batch
    return max(inside, LOGITS_ITEMSIZE * rows * footprint.vocabulary)


def room(footprint: Footprint, load: Load, engine: str, memory: int) -> int:
    """Bytes of memory that are left for weights; may be negative. Raises InputError where compression saves no memory."""
    if not server(engine).packed:
        able = " or ".join(f"--engine {name}" for name, by in SERVERS.items() if by.packed)
        raise InputError(
            f"{engine} decodes the weights when it runs them, so --memory can't be met by compressing; use {able}, or --size"
        )
    return memory - sum(overheads(footprint, load, engine).values())


def summary(footprint: Footprint, load: Load, engine: str, weights: int, decoded: int) -> dict[str, Any]:
    """What serving takes, for a plan: bytes by part, their sum, and the engine's own flags."""
    by = server(engine)
    parts = {"weights": weights if by.packed else decoded} | overheads(footprint, load, engine)
    kept = by.cache(load.cache, engine)
    flags = by.flags.format(context=load.context, batch=load.batch, total=load.context * load.batch, cache=kept.setting)
    return {
        "context": load.context, "batch": load.batch, "cache_type": load.cache, "bytes": parts, "total": sum(parts.values()),
        "engine_basis": by.basis, "flags": flags,
    }  # fmt: skip
