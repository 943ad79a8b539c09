"""The block formats of llama.cpp: scales that the blocks can hold, codes by ADMM, then descent on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import begin, pack_blocks
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Ggml:
    """The block formats of llama.cpp: scales that the blocks can hold, codes by ADMM, then descent on both."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "two_sided"
    paper: ClassVar[str] = "Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM (2017)"
    formats: ClassVar[tuple[str, ...]] = menus.BLOCKS
    levels = staticmethod(menus.blocks)
    begin = staticmethod(begin)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack_blocks("admm", weight, level, stats.h, stats.g, found=stats.bases)


METHOD = Ggml
