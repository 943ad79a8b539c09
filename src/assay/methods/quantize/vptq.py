"""Vectors of four weights from codebooks of their own matrix, error feedback through H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.solve import vectors
from assay.methods.solve.ordered import Order
from assay.model.level import STAGES, VECTOR, Level
from assay.model.packed import Packed
from assay.model.vectors import PackedVectors


@dataclass(frozen=True)
class Vptq:
    """Vectors of four weights from codebooks of their own matrix, error feedback through H.

    From 2.5 bits on with a second codebook for what the first one leaves.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models (2024)"
    formats: ClassVar[tuple[str, ...]] = ("vector",)

    def levels(self, columns: int) -> list[Level]:
        """1 to 4 bits, the codebooks not counted in."""
        return menus.of_format("vector", columns)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        found = vectors.solve(weight, Order.of(weight, stats.h), STAGES[level.bits], VECTOR, scale_dtype)
        return [
            PackedVectors(level, tuple(c[i] for c in found.codes), tuple(t[i] for t in found.tables),
                          found.frame.low[i], found.frame.span[i], weight.shape[1])
            for i in range(len(weight))
        ]  # fmt: skip


METHOD = Vptq
