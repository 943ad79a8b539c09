"""Error feedback through H with any column quantizer, in the order that suits it."""

from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.solve.curvature import DAMPING, INPUT_SHRINKAGE, conditional_importance, take_columns
from assay.methods.solve.feedback import ColumnQuantizer, column_feedback
from assay.methods.solve.gptq import visit


class Order(NamedTuple):
    """How the columns of a batch are visited: loudest inputs first, as in GPTQ's act-order (2022)."""

    visit: Tensor
    """Inputs in order of visit, [batch, in]."""
    factor: Tensor | None
    """U [batch, in, in] of the visited order, inv(H) = UᵀU; None where there is no H."""

    @classmethod
    def of(cls, weight: Tensor, H: Tensor | None, shrinkage: float = INPUT_SHRINKAGE, damping: float = DAMPING) -> "Order":
        """For weight [batch, out, in] and H [batch, in, in]; without H the columns' own order and no feedback."""
        if H is None:
            return cls(torch.arange(weight.shape[-1]).expand(len(weight), -1), None)
        found = visit(weight, H, True, shrinkage, damping)
        return cls(found.order, found.factor)

    @property
    def importance(self) -> Tensor:
        """What a squared error at each input costs under feedback, [batch, in] in original order; ones without H."""
        return torch.ones(self.visit.shape) if self.factor is None else conditional_importance(self.factor, self.visit)

    def taken(self, matrix: Tensor) -> Tensor:
        """[batch, rows, in] with its columns in order of visit."""
        return take_columns(matrix, self.visit)

    def restored(self, matrix: Tensor) -> Tensor:
        """The inverse of `taken`."""
        return take_columns(matrix, self.visit.argsort(-1))

    def feed(self, weight: Tensor, quantize: ColumnQuantizer, block: int = 32) -> None:
        """Show the quantizer every column of weight [batch, out, in] in turn, moved by the errors of those before."""
        values = self.taken(weight.float())
        if self.factor is not None:
            column_feedback(values, self.factor, quantize, block)
            return
        for column in range(values.shape[-1]):
            quantize(column, values[:, :, column])
