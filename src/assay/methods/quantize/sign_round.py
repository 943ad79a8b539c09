"""Offsets before rounding and ranges of groups, learned by the signs of their derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.solve import sign_round
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class SignRound:
    """Offsets before rounding and ranges of groups, learned by the signs of their derivatives."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "two_sided"
    paper: ClassVar[str] = "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs (2023)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS
    levels = staticmethod(menus.integers)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        return pack(sign_round.solve, weight, level, scale_dtype, stats.h, stats.g)


METHOD = SignRound
