"""Error feedback along the columns with the E8 codebook: eight consecutive outputs of a column are one entry."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from assay.methods.grid import lattice
from assay.methods.solve.curvature import damp, shrink
from assay.methods.solve.ordered import Order
from assay.methods.solve.refine import row_scales
from assay.methods.solve.trellis import feedback_gain, swelling
from assay.model.lattice import SIZE


class Coded(NamedTuple):
    """Codes int16 [batch, in, ceil(out / 8)] and scales [batch, out], as stored."""

    codes: Tensor
    scale: Tensor


class LatticeQuantizer:
    """Column quantizer: values [batch, out] over the scales of their rows become entries of the codebook."""

    def __init__(self, scale: Tensor, columns: int) -> None:
        """scale: [batch, out], float32, positive."""
        self.scale, batch = scale, len(scale)
        self.prices = self._cut(scale.square())
        self.codes = torch.empty(batch, columns, self.prices.shape[1] // SIZE, dtype=torch.int16)
        self.values = torch.empty(batch, columns, scale.shape[1])

    def __call__(self, column: int, values: Tensor) -> Tensor:
        found = lattice.encode(self._cut(values / self.scale), self.prices)
        self.codes[:, column], self.values[:, column] = found.codes, found.values[:, : values.shape[1]]
        return self.values[:, column] * self.scale

    def _cut(self, rows: Tensor) -> Tensor:
        return pad(rows, (0, -rows.shape[1] % SIZE))


def solve(weight: Tensor, scale_dtype: torch.dtype, H: Tensor | None, *, shrinkage: float = 0.02, damping: float = 0.01) -> Coded:
    """Encode weights [batch, out, in], rotated on both sides, under H [batch, in, in], rotated too; None: no feedback.

    Scales start at the root mean square of what is expected to be encoded in each row, and end at their least-squares
    optimum for the codes.
    """
    order, (rows, columns) = Order.of(weight, H, shrinkage, damping), weight.shape[1:]
    scale = weight.square().mean(-1).sqrt()
    if order.factor is not None:
        scale = scale * swelling(2, feedback_gain(order.factor)).sqrt()[:, None]
    empty = scale == 0
    scale = scale.masked_fill(empty, 1.0).to(scale_dtype).float()
    quantizer = LatticeQuantizer(scale, columns)
    order.feed(weight, quantizer)
    back = order.visit.argsort(-1)
    codes = torch.stack([c[b] for c, b in zip(quantizer.codes, back, strict=True)])
    metric = torch.eye(columns).expand(len(weight), -1, -1) if H is None else damp(shrink(H, shrinkage), damping)
    rest = torch.eye(rows).expand(len(weight), -1, -1)
    fitted = row_scales(weight, metric, rest, order.restored(quantizer.values.mT), scale)
    return Coded(codes, fitted.masked_fill(empty, 0.0).to(scale_dtype))
