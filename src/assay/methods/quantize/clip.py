"""Round to nearest after a search for the range that loses least under the diagonal of H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import clip
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Clip:
    """Round to nearest after a search for the range that loses least under the diagonal of H."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "AWQ: Activation-aware Weight Quantization (2023), the clipping step"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS + menus.TILES + menus.BLOCKS
    levels = staticmethod(menus.integers)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(clip.solve, weight, level, scale_dtype, stats.h, None, "clip")


METHOD = Clip
