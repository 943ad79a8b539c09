"""Rotated weights in a trellis code, columns in order, each error fed back into the columns to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.solve import trellis
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.packed_trellis import PackedTrellis
from assay.model.rotation import rotate, rotate_both
from assay.model.trellis import Trellis


@dataclass(frozen=True)
class TrellisCoded:
    """Rotated weights in a trellis code, columns in order, each error fed back into the columns to come.

    seed: of the rotation's signs.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "Q-Palette (2025); QTIP: Quantization with Trellises and Incoherence Processing (2024)"
    formats: ClassVar[tuple[str, ...]] = ("trellis",)

    seed: int = 0

    def levels(self, columns: int) -> list[Level]:
        """Every quarter of a bit."""
        return menus.of_format("trellis", columns)

    def encode(
        self, weight: Tensor, level: Level, scale_dtype: torch.dtype, h: Tensor | None, g: Tensor | None
    ) -> list[Packed]:
        """See `Encoder.encode`."""
        columns = weight.shape[-1]
        inputs = torch.eye(columns).expand(len(weight), -1, -1) if h is None else rotate_both(h, self.seed)
        code = Trellis.of_rate(level.bits)
        streams, scales = trellis.solve(rotate(weight, self.seed), code, scale_dtype, inputs, g)
        return [PackedTrellis(level, s, scale, columns, self.seed) for s, scale in zip(streams, scales, strict=True)]


METHOD = TrellisCoded
