"""Rotated weights in a trellis code along the antidiagonals, errors fed back through H and G."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.solve import trellis
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.packed_trellis import PackedTrellis
from assay.model.rotation import rotate, rotate_both
from assay.model.trellis import Trellis


@dataclass(frozen=True)
class TrellisCoded:
    """Rotated weights in a trellis code along the antidiagonals, errors fed back through H and G.

    seed: of the rotations' signs.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "two_sided"
    paper: ClassVar[str] = "Q-Palette (2025); QTIP: Quantization with Trellises and Incoherence Processing (2024)"
    formats: ClassVar[tuple[str, ...]] = ("trellis",)

    seed: int = 0

    def levels(self, columns: int) -> list[Level]:
        """Every quarter of a bit."""
        return menus.of_format("trellis", columns)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        turned = rotate(rotate(weight, self.seed).mT, self.seed).mT
        moments = (None if m is None else rotate_both(m, self.seed) for m in (stats.h, stats.g))
        found = trellis.solve(turned, Trellis.of_rate(level.bits), scale_dtype, *moments)
        return [PackedTrellis(level, w, s, p, self.seed, bool(up)) for w, s, p, up in zip(*found, strict=True)]


METHOD = TrellisCoded
