"""Groups along the outputs of one input column, instead of along the inputs of one row.

Per-IC quantization of AdaDim (Heo et al., 2023): a loud input spoils no scale but its own. Codes are
[..., out, in] as everywhere; scales and zero points are [..., out / group_size, in].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.methods.grid.base import SHRINKS, Affine, Grid
from assay.methods.grid.table import TableGrid
from assay.methods.solve.curvature import DAMPING, INPUT_SHRINKAGE, diagonal, take_columns
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.gptq import visit
from assay.methods.solve.rounded import Rounded, check_shapes


def nearest(weight: Tensor, grid: Grid, G: Tensor | None = None, shrinks: Sequence[float] | None = SHRINKS) -> Rounded:
    """Round `weight` [..., out, in] to nearest; ranges searched, or the plain fit if `shrinks` is None.

    G [..., out, out] weighs the errors within a group by its diagonal; H would be constant there. ValueError as
    `rounded.check`, with groups that have to divide the outputs.
    """
    check_shapes(weight, outputs=G)
    grid.groups(weight.shape[-2])
    turned = weight.mT.contiguous()
    affine = grid.fit(turned) if shrinks is None else grid.fit_clipped(turned, None if G is None else diagonal(G), shrinks)
    return _turned(Rounded(grid.encode(turned, affine), affine))


def decode(rounded: Rounded, grid: Grid) -> Tensor:
    """The weight [..., out, in] in the grid's dtype."""
    turned = _turned(rounded)
    return grid.decode(turned.codes, turned.affine).mT.contiguous()


def _turned(rounded: Rounded) -> Rounded:
    codes, scale, zero = (p.mT.contiguous() for p in (rounded.codes, *rounded.affine))
    return Rounded(codes, Affine(scale, zero))


class ColumnGroups:
    """Column quantizer that fits the groups of a column to what its values have become when it is reached."""

    def __init__(self, grid: Grid, importance: Tensor | None = None, shrinks: Sequence[float] | None = SHRINKS) -> None:
        """importance: what a squared error costs at each output, [batch, out]; shrinks None: the plain fit."""
        self.grid, self.importance, self.shrinks = grid, importance, shrinks
        self.columns: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, column: int, values: Tensor) -> Tensor:
        row = values[:, None].contiguous()  # [batch, 1, out]: to the grid a column is a matrix of one row
        affine = self.grid.fit(row) if self.shrinks is None else self.grid.fit_clipped(row, self.importance, self.shrinks)
        scale, low, high = self.grid.per_weight(affine, row.shape[-1])
        steps = self.grid.snap(row, scale, low, high)
        self.columns.append((self.grid.codes(steps, low)[:, 0], affine.scale[:, 0], affine.zero_point[:, 0]))
        return self.grid.level(steps, scale)[:, 0]

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [batch, out, in], scales and zero points [batch, out / group_size, in], in order of visit."""
        codes, scale, zero = (torch.stack(parts, -1) for parts in zip(*self.columns, strict=True))
        return codes, scale, zero


def gptq(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    *,
    act_order: bool = True,
    shrinks: Sequence[float] | None = SHRINKS,
    shrinkage: float = INPUT_SHRINKAGE,
    damping: float = DAMPING,
    block: int = 32,
) -> Rounded:
    """GPTQ with groups along the outputs; parameters as in `gptq.solve` and `nearest`.

    ValueError also for a grid whose scales depend on the whole matrix: here it is never seen as a whole.
    """
    if H is None:
        return nearest(weight, grid, G, shrinks)
    if isinstance(grid, TableGrid) and grid.scale_format == "nvfp4":
        raise ValueError("NVFP4 scales are set for a whole matrix at once; groups along the outputs are fitted column by column")
    check_shapes(weight, H, G)
    grid.groups(weight.shape[-2])
    flat, order, factor = visit(weight, H, act_order, shrinkage, damping)
    importance = None if G is None else diagonal(G).float().reshape(len(flat), -1)
    quantizer = ColumnGroups(grid, importance, shrinks)
    column_feedback(take_columns(flat, order), factor, quantizer, block)
    back = order.argsort(-1)
    codes, scale, zero = (take_columns(p, back).reshape(*weight.shape[:-2], *p.shape[1:]) for p in quantizer.results())
    return Rounded(codes, Affine(scale, zero))
