"""The entry of the E8 codebook (`model.lattice`) that is nearest to each eight numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.finite import finite
from assay.model.lattice import SCALE, SHIFT, SIZE, decode, half_odd, patterns
from assay.model.threads import spread


class Encoded(NamedTuple):
    """Sequences as the lattice codebook holds them."""

    codes: Tensor
    """int16 [n, length / 8]: the bits of 0 .. 65535."""
    values: Tensor
    """float32 [n, length], what `decode` makes of them, bit for bit."""


def encode(sequences: Tensor, weight: Tensor | None = None) -> Encoded:
    """The codebook entry nearest to each 8 successive numbers of `sequences` [n, length], of about unit variance.

    weight: what a squared error costs, [n, length], not negative; None: all equal. Computed in float32, on the CPU.
    Raises ValueError for other shapes, for NaN or infinity and for negative weights.
    """
    if sequences.dim() != 2 or sequences.shape[1] % SIZE or (weight is not None and weight.shape != sequences.shape):
        shapes = [list(t.shape) for t in (sequences, weight) if t is not None]
        raise ValueError(f"the lattice encodes [n, a multiple of 8] with weights of the same shape, not {shapes}")
    targets = sequences.detach().float().cpu().reshape(-1, SIZE).contiguous()
    prices = torch.ones_like(targets) if weight is None else weight.detach().float().cpu().reshape(-1, SIZE).contiguous()
    if not (finite(targets) and finite(prices)) or bool((prices < 0).any()):
        raise ValueError("sequences and weights of the lattice must be finite, and weights not negative")
    codes = torch.empty(len(targets), dtype=torch.int16)
    odd = half_odd().sum(1).int() % 2 == 1
    spread(_nearest, len(targets), (patterns().T.contiguous().numpy(), odd.numpy()), (targets / SCALE, prices, codes))
    codes = codes.view(len(sequences), -1)
    return Encoded(codes.to(sequences.device), decode(codes).to(sequences.device))


@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "nnan"})
def _nearest(patterns: Any, odd: Any, targets: Any, weight: Any, codes: Any) -> None:
    """patterns [8, 256], odd [256]: whether their sum is; targets, weight [n, 8] -> codes [n].

    With signs free, the best are those of the target. If they don't have the parity that the pattern's sum asks for,
    one must turn: the one where that costs least, 4 weight |target| pattern.
    """
    count = patterns.shape[1]
    errors, turns = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.float32)
    moved = np.empty(len(patterns), dtype=np.float32)
    for n in range(len(targets)):
        best = np.float32(np.inf)
        for shift in range(2):
            errors[:] = 0
            turns[:] = np.inf
            negatives = 0
            for i in range(len(patterns)):
                moved[i] = targets[n, i] - np.float32(SHIFT - 2 * SHIFT * shift)
                size, price, row = abs(moved[i]), weight[n, i], patterns[i]
                negatives += moved[i] < 0
                for p in range(count):
                    difference, turn = size - row[p], price * size * row[p]
                    errors[p] += price * difference * difference
                    turns[p] = min(turns[p], turn)
            for p in range(count):
                wrong = odd[p] != (negatives % 2 == 1)
                error = errors[p] + (np.float32(4) * turns[p] if wrong else np.float32(0))
                if error < best:
                    best, chosen, turned, way = error, p, wrong, shift
        code = (chosen << 8) | way
        move = np.float32(SHIFT - 2 * SHIFT * way)
        cheapest, where = np.float32(np.inf), -1
        for i in range(len(patterns)):
            moved[i] = targets[n, i] - move
            turn = weight[n, i] * abs(moved[i]) * patterns[i, chosen]
            if turned and turn < cheapest:
                cheapest, where = turn, i
        for i in range(len(patterns) - 1):
            code |= ((moved[i] < 0) != (i == where)) << (i + 1)
        codes[n] = np.int16(np.uint16(code))
