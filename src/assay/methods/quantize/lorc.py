"""Any method, then a low-rank product that makes up for its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import base, menus
from assay.methods.base import Statistics
from assay.methods.quantize._sum import with_factors
from assay.methods.solve import low_rank
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Lorc:
    """Any method, then a low-rank product that makes up for its error.

    base: the method; rank: of the levels offered; weighted: whether the product minimises the error at the outputs
    (under H) or that of the weights, as in the paper.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "ZeroQuant-V2: Exploring Post-training Quantization in LLMs, low-rank compensation (2023)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS
    base: str = "gptq"
    rank: int = 8
    weighted: bool = True

    def levels(self, columns: int) -> list[Level]:
        """Those of the base with the rank added."""
        return menus.with_rank(base.get(self.base)().levels(columns), self.rank)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        codes = base.get(self.base)().encode(weight, level.base, scale_dtype, stats)
        if not level.rank:
            return codes
        error = weight - torch.stack([c.decode().float() for c in codes])
        found = low_rank.factors(error, level.rank, stats.h if self.weighted else None)
        return with_factors(level, codes, (found[0].to(scale_dtype), found[1].to(scale_dtype)))


METHOD = Lorc
