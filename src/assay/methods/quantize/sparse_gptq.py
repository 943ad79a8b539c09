"""GPTQ with the weights that a score picks kept in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.grid.formats import grid_of, packed
from assay.methods.quantize._sum import with_exact
from assay.methods.solve.curvature import diagonal
from assay.methods.solve.gptq import FixedGrid
from assay.methods.solve.kept import Kept
from assay.methods.solve.ordered import Order
from assay.methods.split import scores
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class SparseGptq:
    """GPTQ with the weights that a score picks kept in full precision.

    score: "deviation" from the mean of the matrix, "sensitivity" w²/U_jj², or whole "columns" by the energy of their inputs.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression (2023)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS
    score: Literal["deviation", "sensitivity", "columns"] = "deviation"

    def levels(self, columns: int) -> list[Level]:
        """0.5% of the weights exact."""
        return menus.with_sparse(menus.integers(columns), 0.005)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        order, grid = Order.of(weight, stats.h), grid_of(level.base, scale_dtype)
        mask = scores.split(self._scores(weight, order, stats.h), level.kept(*weight.shape[1:]))
        affine = grid.fit_clipped(weight.masked_fill(mask, 0), order.importance)
        inner = FixedGrid(grid, affine, order.visit)
        quantizer = Kept(inner, order, mask, scale_dtype)
        order.feed(weight, quantizer)
        codes = order.restored(inner.codes.mT)
        base = (packed(level.base, grid, c, s, z) for c, s, z in zip(codes, *affine, strict=True))
        return with_exact(level, base, order.restored(quantizer.values.mT), mask, scale_dtype)

    def _scores(self, weight: Tensor, order: Order, h: Tensor | None) -> Tensor:
        if self.score == "sensitivity":
            return scores.sensitivity(weight, order.importance)
        if self.score == "columns":
            return scores.columns(order.importance if h is None else diagonal(h), weight.shape[1])
        return scores.deviation(weight)


METHOD = SparseGptq
