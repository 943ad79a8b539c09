"""AWQ's layout (version `gemm`): `qweight`, `qzeros` and `scales` of each module, inputs along the first axis.

Eight 4-bit codes of neighbouring outputs share an int32 in the order 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits up; zero
points likewise, as they are. One level holds for all modules.
Source: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023), as AutoAWQ stores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.model.bits import pack_rows, unpack_rows
from assay.model.errors import InputError
from assay.model.layouts.base import Headers, Parts, Stored, check_shapes, modules, need, packed, parts_of, setting
from assay.model.layouts.gptq import pattern
from assay.model.level import Level
from assay.model.packed import Packed, PackedInteger

SUFFIXES = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each nibble of a word holds, from the lowest."""


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every module in this layout, by its weight's name. Raises InputError for another version or width."""
    settings = config["quantization_config"]
    version, bits = setting(settings, "version", str, "gemm"), setting(settings, "bits", int, setting(settings, "w_bit", int, 4))
    if str(version).lower() != "gemm" or bits != 4:
        raise InputError(f"config.json: AWQ version {version} with {bits} bits; assay reads version gemm with 4 bits")
    found = {}
    for module in modules(stored, "qweight"):
        need(stored, module, ("qzeros", "scales"))
        columns, words = stored[f"{module}qweight"].shape
        groups, shape = stored[f"{module}scales"].shape[0], (8 * words, columns)
        if not groups or columns % groups:
            raise InputError(f"{module}qweight: {columns} inputs in {groups} groups; download the model again")
        check_shapes(module, stored, {"scales": (groups, 8 * words), "qzeros": (groups, words)})
        whole = groups == 1 and settings.get("group_size") != columns
        level = Level(4, None if whole else columns // groups)
        found[f"{module}weight"] = packed(
            parts_of(stored, module, SUFFIXES), shape, stored[f"{module}scales"].dtype, level,
            lambda parts, level=level: _restore(parts, level),  # type: ignore[misc]
        )  # fmt: skip
    return found


def _restore(parts: Parts, level: Level) -> Packed:
    codes, zeros = (_unpack(parts[name]).T.contiguous() for name in ("qweight", "qzeros"))
    return PackedInteger(level, codes, parts["scales"].T.contiguous(), zeros)


def _unpack(words: Tensor) -> Tensor:
    """int32 [n, words] -> uint8 [n, 8 * words]."""
    count = 8 * words.shape[1]
    mixed = unpack_rows(words, 4, count).unflatten(1, (-1, 8))
    codes = torch.empty_like(mixed)
    codes[..., list(ORDER)] = mixed
    return codes.flatten(1)


def _pack(codes: Tensor) -> Tensor:
    """uint8 [n, outputs] -> int32 [n, outputs / 8]."""
    return pack_rows(codes.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1).contiguous(), 4)


def tensors(weight: Packed) -> dict[str, Tensor]:
    """The stored parts of 4-bit integer codes of a multiple of 8 outputs."""
    assert isinstance(weight, PackedInteger)
    return {
        "qweight": _pack(weight.codes.T.contiguous()),
        "qzeros": _pack(weight.zero_point.T.contiguous()),
        "scales": weight.scale.T.contiguous(),
    }


def nbytes(level: Level, rows: int, columns: int, itemsize: int) -> int:
    """Exact bytes of a [rows, columns] weight."""
    groups = level.groups(columns)
    return rows * columns // 2 + groups * rows // 2 + groups * rows * itemsize


def config(levels: Mapping[str, Level], kept: list[str]) -> dict[str, Any]:
    """quantization_config of modules that share one level; what stays is named twice, GPTQModel reads rules only."""
    (level,) = {(x.bits, x.group_size) for x in levels.values()}
    return {
        "quant_method": "awq", "bits": int(level[0]), "group_size": level[1] or -1, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": sorted(kept) or None, "dynamic": {f"-:{pattern(name)}": {} for name in sorted(kept)} or None,
    }  # fmt: skip
