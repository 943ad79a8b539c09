"""From a solver's codes to packed weights, on any grid of fixed values times a scale, and on blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from assay.methods.base import Statistics
from assay.methods.grid.formats import grid_of, packed
from assay.methods.solve import blocks
from assay.methods.solve.basis import bases
from assay.model.blocks import PackedBlocks
from assay.model.ggml import KINDS, Parts
from assay.model.level import Level
from assay.model.packed import Packed


def begin(stats: Statistics) -> Statistics:
    """`EarlyEncoder.begin` of methods that solve in the eigenbases of H and G."""
    return stats if stats.h is None else replace(stats, bases=bases(stats.h, stats.g))


def pack(
    solve: Callable[..., Any], weight: Tensor, level: Level, scale_dtype: torch.dtype, h: Tensor | None, g: Tensor | None,
    solver: blocks.Solver | None = None, **options: Any,
) -> list[Packed]:  # fmt: skip
    """Solve a batch [batch, out, in] on the level's grid and pack each matrix; solver: what does it on blocks."""
    if solver and level.format in KINDS:
        return pack_blocks(solver, weight, level, h, g, **options)
    grid = grid_of(level, scale_dtype)
    rounded = solve(weight, grid, H=h, G=g, **options)
    scale, zero_point = rounded.affine
    return [packed(level, grid, c, s, z) for c, s, z in zip(rounded.codes, scale, zero_point, strict=True)]


def pack_blocks(
    solver: blocks.Solver, weight: Tensor, level: Level, h: Tensor | None, g: Tensor | None, **options: Any
) -> list[Packed]:
    """The same for a level that is a block format."""
    level.groups(weight.shape[-1])
    found = blocks.solve(weight, level.format, solver, h, g, **options)
    return [PackedBlocks.of(level.format, Parts(*(None if p is None else p[i] for p in found))) for i in range(len(weight))]  # type: ignore[arg-type]
