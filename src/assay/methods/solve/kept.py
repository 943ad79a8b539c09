"""Error feedback in which some weights stay in full precision."""

import torch
from torch import Tensor

from assay.methods.solve.feedback import ColumnQuantizer
from assay.methods.solve.ordered import Order


class Kept:
    """Column quantizer that leaves masked weights as they are at their turn, and gives the others to another one.

    At its turn a weight has taken up errors of the columns before it; storing that value ends them there
    (as SpQR, 2023, does). `values` [batch, in, out] ends as what every weight was at its turn, in order of visit.
    """

    def __init__(self, inner: ColumnQuantizer, order: Order, mask: Tensor, dtype: torch.dtype) -> None:
        """mask: bool [batch, out, in]; dtype: the kept weights are stored in."""
        self.inner, self.dtype = inner, dtype
        self.mask = order.taken(mask).mT.contiguous()
        self.values = torch.empty(self.mask.shape)

    def __call__(self, column: int, values: Tensor) -> Tensor:
        self.values[:, column] = values.to(self.dtype)
        return torch.where(self.mask[:, column], self.values[:, column], self.inner(column, values))
