"""Memory of a served model: weights, cache, working memory and the engine's own, at a stated context and batch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from assay.engines.serving import SERVERS, CacheType, Server, server
from assay.measure.footprint import Footprint
from assay.model.errors import InputError
from assay.runtime.tape import DECODED_AT_ONCE

WORK_ITEMSIZE = 2
LOGITS_ITEMSIZE = 4
PART_ITEMSIZE = 14
"""Of what decoding a part of a cache takes at its widest: 13.3 bytes a number measured, where keys have a low rank."""
DEFAULT_CACHE = "fp16"


@dataclass(frozen=True)
class Load:
    """What is served at once. context: tokens of each sequence; batch: sequences; cache: how keys and values are stored."""

    context: int
    batch: int = 1
    cache: str = DEFAULT_CACHE


class CacheBytes(Protocol):
    """A planned cache, as far as memory asks: bytes of all sequences, whether all is exact, types of keys and of values where
    all layers have the same, and a word for it."""

    @property
    def nbytes(self) -> int: ...

    @property
    def lossless(self) -> bool: ...

    @property
    def types(self) -> tuple[str, str]: ...

    @property
    def title(self) -> str: ...


def parse_tokens(text: str | int) -> int:
    """Tokens of "32k" (1024 each), "1M" or a plain number. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", str(text))
    value = int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()] if match else 0
    if value < 1:
        raise InputError(f"--context {text}: give a number of tokens above zero, like 8192 or 32k (k is 1024)")
    return value


def check(footprint: Footprint, load: Load) -> None:
    """Raises InputError for a model whose cache isn't known, and for more context than it reads."""
    if footprint.unknown:
        raise InputError(f"{footprint.unknown}, so neither is its cache; give --size instead of --memory and --context")
    if footprint.context is not None and load.context > footprint.context:
        raise InputError(f"--context {load.context} is more than the {footprint.context} tokens that this model reads")


def overheads(footprint: Footprint, load: Load, engine: str, cache: CacheBytes | None = None) -> dict[str, int]:
    """Bytes beside the weights: cache, activations, engine. Raises InputError for what the model or engine hasn't.

    cache: one that was planned, in place of the load's type.
    """
    check(footprint, load)
    by = server(engine)
    nbytes = cache.nbytes if cache else cache_bytes(footprint, load, by, by.cache(load.cache, engine))
    packed = cache is not None and not cache.lossless
    return {"cache": nbytes, "activations": activation_bytes(footprint, load, by, packed), "engine": by.overhead}


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


def activation_bytes(footprint: Footprint, load: Load, by: Server, packed: bool = False) -> int:
    """Bytes of the widest moment of a step: the residual stream and its copy, both halves of the MLP, and the logits.

    And what the engine decodes meanwhile: its largest matrix and a part of a `packed` cache, as single queries read it.
    """
    tokens = min(by.at_once or load.context * load.batch, load.context * load.batch)
    inside = WORK_ITEMSIZE * tokens * (4 * footprint.hidden + 3 * footprint.intermediate)
    rows = tokens if by.logits == "token" else load.batch
    matrix = footprint.hidden * max(footprint.intermediate, footprint.vocabulary)
    held = max((x.keys + x.values for x in footprint.layers), default=0) * load.context * load.batch if packed else 0
    layer = PART_ITEMSIZE * min(held, DECODED_AT_ONCE) if by.decoded else 0
    return max(inside, LOGITS_ITEMSIZE * rows * footprint.vocabulary) + by.decoded * matrix + layer


def room(footprint: Footprint, load: Load, engine: str, memory: int, cache: CacheBytes | None = None) -> int:
    """Bytes of memory that are left for weights; may be negative. Raises InputError where compression saves no memory."""
    if not server(engine).packed:
        able = " or ".join(f"--engine {name}" for name, by in SERVERS.items() if by.packed)
        raise InputError(
            f"{engine} decodes the weights when it runs them, so --memory can't be met by compressing; use {able}, or --size"
        )
    return memory - sum(overheads(footprint, load, engine, cache).values())


def summary(
    footprint: Footprint, load: Load, engine: str, weights: int, decoded: int, cache: CacheBytes | None = None
) -> dict[str, Any]:
    """What serving takes, for a plan: bytes by part, their sum, and the engine's own flags.

    weights: bytes of all tensors as the engine holds them; decoded: of all tensors uncompressed; cache: a planned one.
    """
    by = server(engine)
    parts = {"weights": weights if by.packed else decoded} | overheads(footprint, load, engine, cache)
    keys, values = cache.types if cache else (load.cache, load.cache)
    words = {"cache": "", "keys": "", "values": ""}
    if by.alike == "none":
        attached = "with assay.attach(model, *assay.planned_cache(OUT)): "
        words["cache"] = attached if cache is not None and not cache.lossless else ""
    else:
        words = {"cache": keys, "keys": keys, "values": values}
        words = {part: by.cache(name, engine).setting for part, name in words.items()}
    flags = by.flags.format(context=load.context, batch=load.batch, total=load.context * load.batch, **words)
    return {
        "context": load.context, "batch": load.batch, "cache_type": cache.title if cache else load.cache, "bytes": parts,
        "total": sum(parts.values()), "engine_basis": by.basis, "flags": flags,
    }  # fmt: skip
