"""Levels that follow a power law, its exponent searched for each matrix; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.grid.fits import fit_power
from assay.methods.grid.formats import packed
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Nupes:
    """Levels that follow a power law, its exponent searched for each matrix; no data.

    clipped: search each scale as well, for every exponent; else the range is that of the weights, as in the paper.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ()
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search (2023), without data"
    formats: ClassVar[tuple[str, ...]] = ("power",)
    clipped: bool = True

    def levels(self, columns: int) -> list[Level]:
        """2 to 6 bits."""
        return menus.of_format("power", columns)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        fits = [fit_power(w, int(level.bits), level.group_size, scale_dtype, clipped=self.clipped) for w in weight]
        return [packed(level, f.grid, f.grid.encode(w, f.affine), *f.affine) for f, w in zip(fits, weight, strict=True)]


METHOD = Nupes
