"""Round to nearest on the min-max grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import nearest
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Nearest:
    """Round to nearest on the min-max grid."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ()
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "none (round to nearest)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS + menus.TILES + menus.BLOCKS
    levels = staticmethod(menus.integers)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(nearest.solve, weight, level, scale_dtype, None, None, "nearest")


METHOD = Nearest
