"""Floats whose split into exponent and mantissa is searched for each matrix, with a bias for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.grid.fits import fit_bias
from assay.methods.grid.formats import packed
from assay.methods.solve.curvature import diagonal
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class LlmFp4:
    """Floats whose split into exponent and mantissa is searched for each matrix, with a bias for each group.

    A real bias is a scale. What the paper does to activations besides isn't here.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "LLM-FP4: 4-Bit Floating-Point Quantized Transformers (2023), its weights"
    formats: ClassVar[tuple[str, ...]] = ("fp",)

    def levels(self, columns: int) -> list[Level]:
        """4, 6 and 8 bits."""
        return menus.of_format("fp", columns)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        costs = [None] * len(weight) if stats.h is None else list(diagonal(stats.h))
        bits, size = int(level.bits), level.group_size
        fits = [fit_bias(w, bits, size, scale_dtype, importance=c) for w, c in zip(weight, costs, strict=True)]
        return [packed(level, f.grid, f.grid.encode(w, f.affine), *f.affine) for f, w in zip(fits, weight, strict=True)]


METHOD = LlmFp4
