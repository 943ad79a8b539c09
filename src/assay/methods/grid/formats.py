"""From a level's format to its grid, and from a grid's codes to what is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.methods.grid.integer import IntegerGrid
from assay.model.level import Level
from assay.model.packed import Packed, PackedInteger


def grid_of(level: Level, scale_dtype: torch.dtype) -> IntegerGrid:
    """The grid of a level of scalars."""
    return IntegerGrid(int(level.bits), level.group_size, level.symmetric, scale_dtype)


def packed(level: Level, grid: IntegerGrid, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Packed:
    """The stored form of one matrix's codes [out, in]."""
    return PackedInteger(level, codes, scale, zero_point.to(torch.uint8).expand(scale.shape))
