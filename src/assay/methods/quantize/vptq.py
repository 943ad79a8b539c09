"""Vectors of four weights from codebooks of their own matrix, error feedback through H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._sum import with_exact
from assay.methods.solve import vectors
from assay.methods.solve.curvature import diagonal
from assay.methods.solve.ordered import Order
from assay.methods.split import scores
from assay.model.level import STAGES, VECTOR, Level
from assay.model.packed import Packed
from assay.model.vectors import PackedVectors


@dataclass(frozen=True)
class Vptq:
    """Vectors of four weights from codebooks of their own matrix, error feedback through H.

    From 2.5 bits on with a second codebook for what the first one leaves. Outlier columns, the ones with the loudest
    inputs, are kept exactly, where the paper gives them a codebook of their own; 1% of them cost 0.3 bits and gained 3% at 2 bits
    on pebble.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models (2024)"
    formats: ClassVar[tuple[str, ...]] = ("vector",)

    def levels(self, columns: int) -> list[Level]:
        """1 to 4 bits, the codebooks not counted in, alone and with the loudest 1% of the columns exact."""
        alone = menus.of_format("vector", columns)
        return alone + menus.with_sparse(alone, 0.01)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        loud = weight.square().mean(-2) if stats.h is None else diagonal(stats.h)
        mask = scores.split(scores.columns(loud, weight.shape[1]), level.kept(*weight.shape[1:]))
        found = vectors.solve(weight, Order.of(weight, stats.h), STAGES[level.bits], VECTOR, scale_dtype, mask)
        packed = [
            PackedVectors(level.base, tuple(c[i] for c in found.codes), tuple(t[i] for t in found.tables),
                          found.frame.low[i], found.frame.span[i], weight.shape[1])
            for i in range(len(weight))
        ]  # fmt: skip
        return with_exact(level, packed, found.values, mask, scale_dtype)


METHOD = Vptq
