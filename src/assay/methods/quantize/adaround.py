"""Up or down for every weight, learned through a sigmoid that is driven to its ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import adaround
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class AdaRound:
    """Up or down for every weight, learned through a sigmoid that is driven to its ends."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "two_sided"
    paper: ClassVar[str] = "Up or Down? Adaptive Rounding for Post-Training Quantization (2020)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS
    levels = staticmethod(menus.integers)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(adaround.solve, weight, level, scale_dtype, stats.h, stats.g)


METHOD = AdaRound
