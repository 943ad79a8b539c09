"""The weights with the largest gradients kept exactly, the rest rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.quantize._sum import with_exact
from assay.methods.solve import nearest
from assay.methods.split.scores import split
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Gwq:
    """The weights with the largest gradients kept exactly, the rest rounded to nearest."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "GWQ: Gradient-Aware Weight Quantization for Large Language Models (2024)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS

    def levels(self, columns: int) -> list[Level]:
        """1% of the weights exact."""
        return menus.with_sparse(menus.integers(columns), 0.01)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`. Without gradients the largest weights are kept."""
        mask = split((weight if stats.gradient is None else stats.gradient).abs(), level.kept(*weight.shape[1:]))
        codes = pack(nearest.solve, weight.masked_fill(mask, 0), level.base, scale_dtype, None, None)
        return with_exact(level, codes, weight, mask, scale_dtype)


METHOD = Gwq
