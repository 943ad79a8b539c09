"""Error feedback along the inputs: round a column, move the columns not yet rounded to make up for it.

The loop of OBQ and GPTQ (Frantar et al., 2022), blocked so that most of its work is matrix products.
It knows nothing of grids: whatever maps a column to a column it can have (an integer grid, a codebook
over several rows, a mask) is a quantizer.
"""

from typing import Protocol

import torch
from torch import Tensor


class ColumnQuantizer(Protocol):
    """Rounds one column at a time and remembers its codes itself."""

    def __call__(self, column: int, values: Tensor) -> Tensor:
        """What the values [batch, out] of a column become; `column` counts in order of visit."""
        ...


def column_feedback(weight: Tensor, factor: Tensor, quantize: ColumnQuantizer, block: int = 32) -> Tensor:
    """Visit the columns of `weight` [batch, out, in] in order; returns the errors E [batch, out, in].

    factor: U [batch, in, in], upper, inv(H) = U^T U. With q what column j became,
    e_j = (w_j - q) / U_jj and every later column k loses e_j U_jk. So D = W - Q = E U and the sum
    of E^2 equals tr(D H D^T), whatever the quantizer does. Within a block the feedback is applied
    column by column, beyond it as one product per block; the block size changes only rounding.
    """
    columns = weight.shape[-1]
    values = weight.float().mT.contiguous()  # [batch, in, out]: a column is contiguous
    errors = torch.empty_like(values)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        present, upper = values[:, start:stop], factor[:, start:stop, start:stop]
        _round_block(present, upper, errors[:, start:stop], quantize, start)
        if stop < columns:
            reach = factor[:, start:stop, stop:].mT
            values[:, stop:] -= reach @ errors[:, start:stop]
    return errors.mT


def _round_block(values: Tensor, upper: Tensor, errors: Tensor, quantize: ColumnQuantizer, start: int) -> None:
    """Round the columns of one block [batch, block, out] in place, filling `errors` of that shape."""
    for k in range(values.shape[1]):
        column = values[:, k]
        error = (column - quantize(start + k, column)) / upper[:, k, k, None]
        errors[:, k] = error
        later = values[:, k + 1 :]
        later -= upper[:, k, k + 1 :, None] * error[:, None, :]
