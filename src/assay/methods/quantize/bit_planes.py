"""Two bits, and planes of signs over them: the first part of the file is the same weight in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import gptq
from assay.methods.solve.binary import plane
from assay.methods.solve.ordered import Order
from assay.model.binary import PackedPlanes, base_level
from assay.model.level import PLANES_BASE, Level
from assay.model.packed import Packed, PackedInteger


@dataclass(frozen=True)
class BitPlanes:
    """Two bits, and planes of signs over them: the first part of the file is the same weight in fewer bits."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "D2MoE: Dual Routing and Dynamic Scheduling for On-Device MoE-based LLM Serving (2025)"
    formats: ClassVar[tuple[str, ...]] = ("planes",)

    def levels(self, columns: int) -> list[Level]:
        """One to four planes."""
        return [x for x in menus.of_format("planes", columns) if x.bits > PLANES_BASE]

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`. The planes of a low level are the first ones of a high level."""
        order, groups = Order.of(weight, stats.h), level.groups(weight.shape[-1])
        codes = [
            c for c in pack(gptq.solve, weight, base_level(level), scale_dtype, stats.h, None) if isinstance(c, PackedInteger)
        ]
        none = torch.empty(0, *weight.shape[1:], dtype=torch.bool), torch.empty(0, weight.shape[1], groups, dtype=scale_dtype)
        packed = [PackedPlanes(level, c, *none) for c in codes]
        found: list[tuple[Tensor, Tensor]] = []
        for _ in range(int(level.bits) - PLANES_BASE):
            before = torch.stack([p.decode().float() for p in packed])
            found.append(plane(weight, before, order, groups, scale_dtype))
            stacked = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
            packed = [PackedPlanes(level, c, s, d) for c, s, d in zip(codes, *stacked, strict=True)]
        return list(packed)


METHOD = BitPlanes
