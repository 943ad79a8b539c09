"""From a solver's codes to packed weights, on any grid of fixed values times a scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.methods.grid.formats import grid_of, packed
from assay.model.level import Level
from assay.model.packed import Packed


def pack(
    solve: Callable[..., Any], weight: Tensor, level: Level, scale_dtype: torch.dtype, h: Tensor | None, g: Tensor | None
) -> list[Packed]:
    """Solve a batch [batch, out, in] on the level's grid and pack each matrix."""
    grid = grid_of(level, scale_dtype)
    rounded = solve(weight, grid, H=h, G=g)
    scale, zero_point = rounded.affine
    return [packed(level, grid, c, s, z) for c, s, z in zip(rounded.codes, scale, zero_point, strict=True)]
