"""Rotated weights in the E8 lattice, eight in sixteen bits, errors fed back through H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.solve import lattice
from assay.model.lattice import PackedLattice
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.rotation import rotate, rotate_both


@dataclass(frozen=True)
class QuipSharp:
    """Rotated weights in the E8 lattice, eight in sixteen bits, errors fed back through H.

    The eight are outputs of one column, so that feedback goes column by column; in the paper they are inputs of
    one row, fed back eight columns at a time. seed: of the rotations' signs.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks (2024)"
    formats: ClassVar[tuple[str, ...]] = ("lattice",)

    seed: int = 0

    def levels(self, columns: int) -> list[Level]:
        """2 bits."""
        return menus.of_format("lattice", columns)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        turned = rotate(rotate(weight, self.seed).mT, self.seed).mT
        found = lattice.solve(turned, scale_dtype, None if stats.h is None else rotate_both(stats.h, self.seed))
        return [PackedLattice(level, codes, scale, self.seed) for codes, scale in zip(*found, strict=True)]


METHOD = QuipSharp
