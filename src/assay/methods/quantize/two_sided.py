"""Error feedback along columns through H and along rows through G."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import two_sided
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class TwoSided:
    """Error feedback along columns through H and along rows through G."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "two_sided"
    paper: ClassVar[str] = "GPTQ (2022) along the columns and, through the Kronecker-factored Fisher (2015), along the rows"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS + menus.TILES + menus.BLOCKS
    levels = staticmethod(menus.integers)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(two_sided.solve, weight, level, scale_dtype, stats.h, stats.g, "two_sided")


METHOD = TwoSided
