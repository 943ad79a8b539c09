"""Error feedback over the columns of a rotated weight, each column encoded by a trellis along its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.methods.grid import trellis
from assay.methods.solve.curvature import damp, falling_order, inverse_factor, permute, shrink, take_columns
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.refine import row_scales
from assay.model.level import sequences
from assay.model.trellis import Trellis


class TrellisColumns:
    """Column quantizer: rows are divided by their scale and weighted by what an error of theirs costs."""

    def __init__(self, code: Trellis, scale: Tensor, cost: Tensor, order: Tensor) -> None:
        """scale, cost: [batch, out], float32; order: the inputs in order of visit, [batch, in]."""
        batch, rows = scale.shape
        self.code, self.scale, self.order = code, scale, order
        self.weight = cost * scale.square()
        self.lengths = sequences(rows)
        words = sum(code.words(n) for n in self.lengths)
        self.streams = torch.empty(batch, order.shape[1], words, dtype=torch.int32)
        self.values = torch.empty(batch, rows, order.shape[1])

    def begin_block(self, start: int, values: Tensor) -> None:
        """Nothing to do: scales are fixed."""

    def __call__(self, column: int, values: Tensor) -> Tensor:
        parts = zip((values / self.scale).split(self.lengths, 1), self.weight.split(self.lengths, 1), strict=True)
        found = [trellis.encode(self.code, part, weight) for part, weight in parts]
        places = self.order[:, column]
        batch = torch.arange(len(values))
        self.streams[batch, places] = torch.cat([f.stream for f in found], 1)
        decoded = torch.cat([f.values for f in found], 1)
        self.values[batch, :, places] = decoded
        return decoded * self.scale


def solve(
    weight: Tensor, code: Trellis, scale_dtype: torch.dtype, H: Tensor, G: Tensor | None, *, shrinkage: float = 0.02,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(streams int32 [batch, in, words], scales [batch, out] in `scale_dtype`) of a rotated weight [batch, out, in].

    H: [batch, in, in] in the rotated basis; G: [batch, out, out] or None. Scales start at the rows' root mean square
    and end at their least-squares optimum under H and G.
    """
    inputs = shrink(H, shrinkage)
    order = falling_order(inputs)
    factor, used = inverse_factor(permute(inputs, order), damping)
    scale = weight.square().mean(-1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0).to(scale_dtype)
    cost = torch.ones_like(scale, dtype=torch.float32) if G is None else G.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    columns = TrellisColumns(code, scale.float(), cost / cost.mean(1, keepdim=True), order)
    column_feedback(take_columns(weight, order), factor, columns)
    outputs = torch.eye(weight.shape[1]).expand(len(weight), -1, -1) if G is None else damp(shrink(G, 0.1), damping)
    fitted = row_scales(weight, damp(inputs, used), outputs, columns.values, scale.float())
    return columns.streams, fitted.to(scale_dtype)
