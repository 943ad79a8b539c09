"""Names that people know for levels, and names that stand for methods."""

from __future__ import annotations

import difflib

from assay import engines
from assay.methods import base
from assay.model.errors import InputError
from assay.model.level import Level

PRESETS = {
    "W3A16": "int3-g128-sym", "W4A16": "int4-g128-sym", "W8A16": "int8-channel-sym", "NF4": "nf4-g64", "FP4": "fp4-g64",
    "FP8": "fp8-channel", "FP8_BLOCK": "tile8-g128",
    "MXFP4": "mxfp4-g32", "MXFP6": "mxfp6-g32", "MXFP8": "mxfp8-g32", "NVFP4": "nvfp4-g16",
}  # fmt: skip


def level(name: str) -> Level:
    """A level by its own name or a preset's. Raises InputError naming the nearest."""
    if name.upper() in PRESETS:
        return Level.parse(PRESETS[name.upper()])
    try:
        return Level.parse(name)
    except InputError as error:
        near = difflib.get_close_matches(name.upper(), PRESETS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"{error}; {hint}presets: {', '.join(PRESETS)}") from None


def method(name: str, engine: str) -> str:
    """What a name stands for: auto is the quick default, best what measured best in the engine's formats. Raises InputError."""
    if name in ("auto", "best"):
        held = engines.get(engine).formats
        if "int" not in held:
            return "ggml"
        best = "trellis" if "trellis" in held else "admm"
        return best if name == "best" else "two_sided"
    base.get(name)
    return name


def fit(method: str, wanted: Level) -> None:
    """Raises InputError when the method can't make a level, naming those that can.

    A method takes exact weights, a low-rank term, or integers with or without zero points if it offers levels that have them.
    """
    if _makes(method, wanted):
        return
    able = [n for n in base.names() if _makes(n, wanted)]
    raise InputError(f"{method} does not make {wanted.name}; these do: {', '.join(able) or 'none'}")


def _makes(method: str, wanted: Level) -> bool:
    kind = base.get(method)()
    offered = kind.levels(128)
    sparse, rank = any(x.sparse for x in offered), any(x.rank for x in offered)
    zeros = wanted.format != "int" or any(x.symmetric == wanted.symmetric for x in offered)
    return wanted.format in kind.formats and zeros and (sparse or not wanted.sparse) and (rank or not wanted.rank)
