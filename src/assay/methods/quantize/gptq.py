"""Rounding column by column, each error fed back into the columns to come through the inverse of H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import gptq
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Gptq:
    """Rounding column by column, each error fed back into the columns to come through the inverse of H."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (2022)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS + menus.TILES + menus.BLOCKS
    levels = staticmethod(menus.integers)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(gptq.solve, weight, level, scale_dtype, stats.h, None, "gptq")


METHOD = Gptq
