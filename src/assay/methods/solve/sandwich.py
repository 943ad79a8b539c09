"""left @ X @ right for one X after another: what a step of learning, or of ADMM, costs in a large matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from assay.model.precision import has_bf16
from assay.model.threads import side_by_side

LARGE = 1 << 20
"""Weights of a matrix from which products are what its solution takes."""
ROWS = 256
"""Of a product at once: enough pieces for every thread to be busy to the end, few enough to read the other factor rarely."""


def sandwich(left: Tensor | None, right: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """X [batch, rows, in] to left @ X @ right, float32; left [batch, rows, rows], None: the identity; right [batch, in, in].

    Large products round their factors and the result to bf16, where the processor has units for that: for steps whose
    direction is what counts. They are made in pieces, each on one thread: bf16 products of several threads have other last bits.
    """
    if rows * right.shape[-1] < LARGE or not has_bf16(right.device.type):
        return lambda middle: (middle if left is None else left @ middle) @ right
    outer, inner = None if left is None else left.bfloat16(), right.bfloat16()

    def product(middle: Tensor) -> Tensor:
        found, rough = torch.empty_like(middle), middle.bfloat16()

        def piece(place: tuple[int, int]) -> None:
            n, start = place
            own = slice(start, start + ROWS)
            found[n, own] = (rough[n, own] if outer is None else outer[n, own] @ rough[n]) @ inner[n]

        side_by_side(piece, [(n, start) for n in range(len(middle)) for start in range(0, rows, ROWS)], 0)
        return found

    return product
