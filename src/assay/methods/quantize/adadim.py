"""Groups along the inputs of a row or along the outputs of a column, whichever loses less; error feedback through H."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import by_input, gptq
from assay.methods.solve.curvature import damage, total
from assay.methods.solve.rounded import Rounded
from assay.model.level import Level
from assay.model.packed import Packed, PackedAxis, PackedInteger


@dataclass(frozen=True)
class AdaDim:
    """Groups along the inputs of a row or along the outputs of a column, whichever loses less; error feedback through H.

    Chosen for each matrix by the error at its outputs, where the paper takes that of the module and of plain rounding.
    Groups along the outputs are tried where they take the same bytes.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of LLMs (2023)"
    formats: ClassVar[tuple[str, ...]] = ("axis",)

    def levels(self, columns: int) -> list[Level]:
        """Those of integers."""
        return [replace(x, format="axis") for x in menus.integers(columns)]

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        grid = IntegerGrid(int(level.bits), level.group_size, level.symmetric, scale_dtype)
        rows = gptq.solve(weight, grid, H=stats.h)
        losses = _loss(weight - grid.decode(rows.codes, rows.affine).float(), stats.h)
        if not PackedAxis.fits(level, *weight.shape[1:]):
            return [_packed(level, rows, i, False) for i in range(len(weight))]
        columns = by_input.gptq(weight, grid, stats.h)
        better = _loss(weight - by_input.decode(columns, grid).float(), stats.h) < losses
        return [_packed(level, columns if better[i] else rows, i, bool(better[i])) for i in range(len(weight))]


def _loss(difference: Tensor, H: Tensor | None) -> Tensor:
    """Squared error at the outputs, or of the weights, [batch]."""
    return total(difference.square()) if H is None else damage(difference, H)


def _packed(level: Level, rounded: Rounded, index: int, turned: bool) -> PackedAxis:
    codes, scale, zero = (p[index].T.contiguous() if turned else p[index] for p in (rounded.codes, *Affine(*rounded.affine)))
    inner = PackedInteger(replace(level, format="int"), codes, scale, zero.to(torch.uint8).expand(scale.shape))
    return PackedAxis(level, inner, turned)


METHOD = AdaDim
