"""Eight bits a weight whose top bits are the weight at every smaller width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.nested import MASTER_BITS, narrowed
from assay.methods.quantize._scalar import pack
from assay.methods.solve import scale_fit
from assay.methods.solve.rounded import Rounded
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Nested:
    """Eight bits a weight whose top bits are the weight at every smaller width.

    Asked for a smaller width it gives what `narrowed` makes of its eight bits. The paper also trains with all widths.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ()
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "Double Rounding: Nesting Bit-widths for Multi-precision Quantization (2025), without its training"
    formats: ClassVar[tuple[str, ...]] = ("int",)
    levels = staticmethod(menus.symmetric)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`. Raises InputError for a level with zero points."""
        if not level.symmetric:
            raise InputError(f"nested makes symmetric levels, not {level.name}; ask for {level.name.replace('asym', 'sym')}")
        return pack(_solve, weight, level, scale_dtype, None, None)


def _solve(weight: Tensor, grid: IntegerGrid, H: Tensor | None = None, G: Tensor | None = None) -> Rounded:
    master = scale_fit.solve(weight, IntegerGrid(MASTER_BITS, grid.group_size, True, grid.scale_dtype))
    return Rounded(*narrowed(master.codes, master.affine, grid.bits))


METHOD = Nested
