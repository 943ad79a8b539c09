"""From a solver's codes to packed integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from assay.methods.grid.integer import IntegerGrid
from assay.model.level import Level
from assay.model.packed import PackedInteger


def pack(
    solve: Callable[..., Any], weight: Tensor, level: Level, scale_dtype: torch.dtype, h: Tensor | None, g: Tensor | None
) -> list[PackedInteger]:
    """Solve a batch [batch, out, in] on the level's grid and pack each matrix."""
    grid = IntegerGrid(level.bits, level.group_size, level.symmetric, scale_dtype)
    rounded = solve(weight, grid, H=h, G=g)
    scale, zero_point = rounded.affine
    zeros = zero_point.to(torch.uint8).expand(scale.shape)
    return [PackedInteger(level, c, s, z) for c, s, z in zip(rounded.codes, scale, zeros, strict=True)]
