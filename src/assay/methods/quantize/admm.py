"""A free copy of the weights and a rounded one, tied ever tighter (ADMM), then descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import begin, pack
from assay.methods.solve import admm
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Admm:
    """A free copy of the weights and a rounded one, tied ever tighter (ADMM), then descent."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "two_sided"
    paper: ClassVar[str] = "Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM (2017)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS + menus.BLOCKS
    levels = staticmethod(menus.integers)
    begin = staticmethod(begin)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(admm.solve, weight, level, scale_dtype, stats.h, stats.g, "admm", found=stats.bases)


METHOD = Admm
