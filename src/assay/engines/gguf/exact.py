"""Weights of other formats in ggml's blocks, with the same codes and the same scales, where there is such a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from assay.engines.write import Loaders
from assay.model.blocks import PackedBlocks
from assay.model.errors import InputError
from assay.model.ggml import FP4, KINDS, Parts
from assay.model.level import Level
from assay.model.packed import Packed, PackedInteger, PackedTable

SIGNED = {4: "q4_0", 5: "q5_0", 8: "q8_0"}
NEAREST = ("iq2_xxs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")


def blocks_of(packed: Packed) -> PackedBlocks | str:
    """The same codes and scales as blocks, or why there are none.

    A reader of blocks multiplies in float32, where the dtype of the scales may have rounded the product once more.
    """
    if isinstance(packed, PackedBlocks):
        return packed
    if isinstance(packed, PackedInteger):
        return _integers(packed)
    if isinstance(packed, PackedTable) and packed.level.name == "mxfp4-g32":
        return _mxfp4(packed)
    return "no block has such values"


def _integers(packed: PackedInteger) -> PackedBlocks | str:
    level, columns = packed.level, packed.codes.shape[1]
    if not level.symmetric:
        return "blocks with zero points of this kind don't exist"
    if columns % 32 or (level.group_size or 32) % 32:
        return "groups are no multiples of 32 weights"
    bits = next((b for b in SIGNED if b >= level.bits), 8)
    scale = packed.scale.float()
    if not torch.equal(scale.half().float(), scale):
        return "a scale is no fp16 number"
    kind = SIGNED[bits]
    codes = packed.codes.short() - (1 << (int(level.bits) - 1)) + KINDS[kind].zero
    return PackedBlocks.of(kind, Parts(_per_block(scale, columns), codes))


def _mxfp4(packed: PackedTable) -> PackedBlocks:
    values = packed.table[packed.codes.long()] * 2
    codes = torch.searchsorted(torch.tensor(sorted(set(FP4)), dtype=torch.float32), values)
    order = torch.tensor([FP4.index(v) for v in sorted(set(FP4))], dtype=torch.int16)
    return PackedBlocks.of("mxfp4", Parts(packed.float_scale() / 2, order[codes]))


def _per_block(scale: Tensor, columns: int) -> Tensor:
    return scale.repeat_interleave(columns // 32 // scale.shape[1], 1)


def as_blocks(packed: Loaders) -> tuple[dict[str, PackedBlocks], dict[str, Level]]:
    """Every weight as blocks, and their levels. Raises InputError naming the levels that have none, and what would change."""
    found: dict[str, PackedBlocks] = {}
    reasons: dict[str, str] = {}
    refused: Counter[str] = Counter()
    for name, load in packed.items():
        weight = load()
        made = blocks_of(weight)
        if isinstance(made, str):
            refused[weight.level.name] += 1
            reasons[weight.level.name] = made
        else:
            found[name] = made
    if refused:
        raise InputError(_refusal(refused, reasons, len(packed)))
    return found, {name: made.level for name, made in found.items()}


def _refusal(refused: Mapping[str, int], reasons: Mapping[str, str], total: int) -> str:
    parts = "; ".join(
        f"{count} of {total} weights at {name}: {reasons[name]}, the nearest type is {_nearest(Level.parse(name))}"
        for name, count in sorted(refused.items())
    )
    return f"GGUF can't hold this result as it is ({parts}); compress the model again with --engine llama.cpp"


def _nearest(level: Level) -> str:
    return min(NEAREST, key=lambda kind: abs(KINDS[kind].bits - level.bits - 0.5))
