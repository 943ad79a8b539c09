"""GPTQ's layout: `qweight`, `qzeros`, `scales` and `g_idx` of each module, inputs along the first axis.

Codes are dense little-endian bit streams, along the inputs for weights and along the outputs for zero points, in int32.
Version 1 stores zero points less one, version 2 (`checkpoint_format: gptq_v2`) as they are. Readers of version 1 differ
about a zero point of 0, so what has zero points of its own is written as version 2 only.
Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), as AutoGPTQ and
GPTQModel 7.7 store it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.model.bits import pack_rows, unpack_rows
from assay.model.errors import InputError
from assay.model.layouts.base import Headers, Parts, Stored, check_shapes, matches, modules, need, packed, parts_of, setting
from assay.model.level import FORMATS, Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed, PackedInteger

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}  # fmt: skip
"""Modules that vLLM loads under another name, which rules for single modules must match as well."""


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every module in this layout, by its weight's name. Raises InputError for what contradicts itself."""
    settings = config["quantization_config"]
    later = setting(settings, "checkpoint_format", str, "gptq") == "gptq_v2"
    bits = setting(settings, "bits", int, None)
    found = {}
    for module in modules(stored, "qweight"):
        need(stored, module, ("qzeros", "scales"))
        words, rows = stored[f"{module}qweight"].shape
        if f"{module}g_idx" in stored:
            (columns,) = stored[f"{module}g_idx"].shape
        elif bits:
            columns = words * 32 // bits
        else:
            raise InputError(f"{module}qweight: config.json gives no bits; download the model again")
        width, groups = words * 32 // max(columns, 1), stored[f"{module}scales"].shape[0]
        if width not in FORMATS["int"].bits or not groups or columns % groups:
            raise InputError(f"{module}qweight: {words} words of 32 bits for {columns} inputs in {groups} groups")
        check_shapes(module, stored, {"scales": (groups, rows), "qzeros": (groups, -(-rows * width // 32))})
        facts = _facts_of(settings, module)
        whole = groups == 1 and facts.get("group_size") != columns
        level = Level(width, None if whole else columns // groups, bool(facts.get("sym", False)))
        shape = (rows, columns)
        found[f"{module}weight"] = packed(
            parts_of(stored, module, SUFFIXES), shape, stored[f"{module}scales"].dtype, level,
            lambda parts, level=level, shape=shape: _restore(parts, level, shape, later),  # type: ignore[misc]
        )  # fmt: skip
    return found


def _facts_of(settings: Mapping[str, Any], module: str) -> dict[str, Any]:
    """Settings of a module, the first rule that names it included."""
    for rule, change in (setting(settings, "dynamic", dict, None) or {}).items():
        if not str(rule).startswith("-:") and matches(str(rule).removeprefix("+:"), module.removesuffix(".")):
            return {**settings, **change}
    return dict(settings)


def _restore(parts: Parts, level: Level, shape: tuple[int, int], later: bool) -> Packed:
    rows, columns = shape
    bits = int(level.bits)
    codes = unpack_rows(parts["qweight"].T.contiguous(), bits, columns)
    zeros = unpack_rows(parts["qzeros"].contiguous(), bits, rows)
    if not later:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    if level.symmetric and bool((zeros != 1 << (bits - 1)).any()):
        raise InputError(f"config.json calls int{bits} weights symmetric whose zero points are not {1 << (bits - 1)}")
    plain = PackedInteger(level, codes, parts["scales"].T.contiguous(), zeros.T.contiguous())
    return PackedOrdered.of(plain, parts["g_idx"]) if "g_idx" in parts else plain


def tensors(weight: Packed, later: bool) -> dict[str, Tensor]:
    """The stored parts of integer codes; later: as version 2."""
    ordered = weight if isinstance(weight, PackedOrdered) else None
    plain = ordered.in_order if ordered else weight
    assert isinstance(plain, PackedInteger)
    bits, columns = int(plain.level.bits), plain.codes.shape[1]
    zeros = plain.zero_point if later else (plain.zero_point - 1) & ((1 << bits) - 1)
    groups = torch.arange(columns, dtype=torch.int32) // (columns // plain.scale.shape[1])
    return {
        "qweight": pack_rows(plain.codes, bits).T.contiguous(),
        "qzeros": pack_rows(zeros.T.contiguous(), bits),
        "scales": plain.scale.T.contiguous(),
        "g_idx": ordered.groups if ordered else groups,
    }


def nbytes(level: Level, rows: int, columns: int, itemsize: int) -> int:
    """Exact bytes of a [rows, columns] weight; rows and columns are multiples of 32."""
    bits, groups = int(level.bits), level.groups(columns)
    return rows * columns * bits // 8 + groups * rows * bits // 8 + groups * rows * itemsize + 4 * columns


def config(levels: Mapping[str, Level], kept: list[str], later: bool, ordered: bool) -> dict[str, Any]:
    """quantization_config: the commonest level, rules for modules at others and for the linear ones that stay.

    later: whether zero points are stored as they are; ordered: whether groups of some weights are not neighbours.
    """
    common = max(Counter(levels.values()).items(), key=lambda pair: (pair[1], pair[0]))[0]
    rules: dict[str, dict[str, Any]] = {}
    for name, level in sorted(levels.items()):
        if level != common:
            rules[f"+:{pattern(name.removesuffix('.weight'))}"] = _facts(level)
    rules |= {f"-:{pattern(name)}": {} for name in sorted(kept)}
    return {
        "quant_method": "gptq", **_facts(common), "desc_act": ordered, "lm_head": False, "true_sequential": True,
        "checkpoint_format": "gptq_v2" if later else "gptq", "pack_dtype": "int32", "dynamic": rules or None,
    }  # fmt: skip


def _facts(level: Level) -> dict[str, Any]:
    return {"bits": int(level.bits), "group_size": level.group_size or -1, "sym": level.symmetric}


def pattern(module: str) -> str:
    """A regular expression for one module, under the name that vLLM gives it when it joins it with others too."""
    parent, _, leaf = module.rpartition(".")
    names = f"(?:{leaf}|{FUSED[leaf]})" if leaf in FUSED else re.escape(leaf)
    return f"^{re.escape(parent)}{re.escape('.') if parent else ''}{names}$"
