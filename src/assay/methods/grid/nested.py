"""One integer tensor that holds all narrower ones: their codes are its top bits, rounded."""

import torch
from torch import Tensor

from assay.methods.grid.base import Affine

MASTER_BITS = 8


def narrowed(codes: Tensor, affine: Affine, bits: int) -> tuple[Tensor, Affine]:
    """Symmetric 8-bit codes (uint8, 128 decodes to 0) at `bits` bits, by Double Rounding (2025).

    Halves are rounded up, so a reader needs one addition and one shift. The scale grows by a power of two, which no
    float format rounds.
    """
    shift = MASTER_BITS - bits
    centred = codes.to(torch.int16) - (1 << (MASTER_BITS - 1))
    if shift:
        centred = (centred + (1 << (shift - 1))) >> shift
    middle = 1 << (bits - 1)
    narrow = centred.clamp(-middle, middle - 1) + middle
    return narrow.to(torch.uint8), Affine(affine.scale * 2**shift, torch.full_like(affine.zero_point, middle))
