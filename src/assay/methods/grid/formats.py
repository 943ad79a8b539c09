"""From a level's format to its grid, and from a grid's codes to what is stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from assay.methods.grid import values
from assay.methods.grid.base import Grid
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.scales import ScaleFormat, split_e8m0, split_nvfp4
from assay.methods.grid.table import TableGrid
from assay.methods.grid.tiles import TileGrid
from assay.model.errors import InputError
from assay.model.level import FORMATS, Level
from assay.model.packed import Packed, PackedInteger, PackedTable
from assay.model.tiles import PackedTiles

FLOATS = {4: values.float_values(2, 1), 6: values.float_values(2, 3), 8: values.float_values(4, 3, nans=True)}
"""E2M1, E2M3 and E4M3."""


def grid_of(level: Level, scale_dtype: torch.dtype) -> Grid:
    """The grid of a level whose values are fixed. Raises InputError for other formats."""
    bits = int(level.bits)
    if level.format in ("int", "axis"):
        return IntegerGrid(bits, level.group_size, level.symmetric, scale_dtype)
    if (tile := FORMATS[level.format].tile) > 1:
        return TileGrid(_values(level.format, bits), level.group_size, scale_dtype, tile=tile)
    scales: ScaleFormat = {"mxfp": "e8m0", "nvfp": "nvfp4"}.get(level.format, "dtype")  # type: ignore[assignment]
    return TableGrid(_values(level.format, bits), level.group_size, scale_dtype, scales)


def _values(name: str, bits: int) -> tuple[float, ...]:
    if name == "nf":
        return values.quantile_values(bits)
    if name == "pow":
        return values.power_of_two(bits)
    if name in ("ternary", "binary"):
        return values.TERNARY if name == "ternary" else values.BINARY
    if name in ("fp", "mxfp", "nvfp", "tile"):
        return FLOATS[bits]
    raise InputError(f"the values of {name} depend on the weights; only its own methods make it")


def packed(level: Level, grid: Grid, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Packed:
    """The stored form of one matrix's codes [out, in]."""
    if isinstance(grid, IntegerGrid):
        return PackedInteger(level, codes, scale, zero_point.to(torch.uint8).expand(scale.shape))
    assert isinstance(grid, TableGrid)
    table = torch.tensor(grid.values)
    table = pad(table, (0, 2**grid.bits - len(table)), value=float(table[-1]))
    if isinstance(grid, TileGrid):
        return PackedTiles(level, codes, table, scale[:: grid.tile].contiguous())
    if grid.scale_format == "e8m0":
        return PackedTable(level, codes, table, grid.scale_dtype, split_e8m0(scale))
    if grid.scale_format == "nvfp4":
        parts, whole = split_nvfp4(scale)
        return PackedTable(level, codes, table, grid.scale_dtype, parts, whole.view(1))
    return PackedTable(level, codes, table, grid.scale_dtype, scale)
