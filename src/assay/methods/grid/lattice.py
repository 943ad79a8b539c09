"""A finite E8 lattice codebook: eight weights in sixteen bits.

E8 moved by a quarter along the diagonal is the half-odd vectors with an even sum, each moved by +1/4 or by -1/4. A
codebook entry is thus a pattern of absolute values (227 with squared norm up to 10, and 29 of the 224 with 12), the
signs of seven of them (the parity of the sum gives the eighth), and which way it is moved: 8 + 7 + 1 bits, and a table
of 256 patterns. Source: E8P of QuIP# (Tseng et al., 2024); which 29 patterns is our choice.

Measured mean squared error on a unit Gaussian: 0.0912, and 0.0891 with the shells of the table pulled apart as below,
which costs nothing. From memory of QTIP (Tseng et al., 2024), E8P has 0.089; a scalar quantizer has 0.1175, the default
trellis 0.0687.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.threads import spread

SIZE = 8
SCALE = 0.945
"""Spacing of the lattice with the least error on a unit Gaussian."""
STRETCH = 0.07
"""Patterns of squared norm 10 and 12 are longer by so much, shorter ones shorter: their cells' means lie there."""
_SHIFT = 0.25


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
    if not all(bool(torch.isfinite(t).all()) for t in (targets, prices)) or bool((prices < 0).any()):
        raise ValueError("sequences and weights of the lattice must be finite, and weights not negative")
    codes = torch.empty(len(targets), dtype=torch.int16)
    odd = half_odd().sum(1).int() % 2 == 1
    spread(_nearest, len(targets), (_patterns().T.contiguous().numpy(), odd.numpy()), (targets / SCALE, prices, codes))
    codes = codes.view(len(sequences), -1)
    return Encoded(codes.to(sequences.device), decode(codes).to(sequences.device))


def decode(codes: Tensor) -> Tensor:
    """The numbers that codes int16 [n, length / 8] stand for, float32 [n, length]."""
    return codebook().to(codes.device)[codes.long() & 0xFFFF].flatten(1)


@cache
def codebook() -> Tensor:
    """All entries by code, float32 [65536, 8]: bits 15..8 the pattern, 7..1 the signs of numbers 0..6, 0 the shift."""
    code = torch.arange(1 << 16)
    negative = code[:, None] >> torch.arange(1, SIZE) & 1
    last = (half_odd()[code >> 8].sum(1).long() + negative.sum(1)) % 2
    signs = 1 - 2 * torch.cat((negative, last[:, None]), 1)
    return (signs * _patterns()[code >> 8] + _SHIFT * (1 - 2 * (code[:, None] & 1))) * SCALE


def _patterns() -> Tensor:
    plain = half_odd()
    outer = plain.square().sum(1, keepdim=True) > 9
    return plain * torch.where(outer, 1 + STRETCH, 1 - STRETCH)


@cache
def half_odd() -> Tensor:
    """Absolute values of the lattice's vectors before they are moved, float32 [256, 8], in units of its spacing.

    Of the longest every 224 / 29th in lexical order.
    """
    halves = [p for p in product((0.5, 1.5, 2.5), repeat=SIZE) if sum(v * v for v in p) <= 12]
    inner = [p for p in halves if sum(v * v for v in p) <= 10]
    outer = [p for p in halves if sum(v * v for v in p) == 12]
    missing = 256 - len(inner)
    return torch.tensor(inner + [outer[i * len(outer) // missing] for i in range(missing)])


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
                moved[i] = targets[n, i] - np.float32(_SHIFT - 2 * _SHIFT * shift)
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
        move = np.float32(_SHIFT - 2 * _SHIFT * way)
        cheapest, where = np.float32(np.inf), -1
        for i in range(len(patterns)):
            moved[i] = targets[n, i] - move
            turn = weight[n, i] * abs(moved[i]) * patterns[i, chosen]
            if turned and turn < cheapest:
                cheapest, where = turn, i
        for i in range(len(patterns) - 1):
            code |= ((moved[i] < 0) != (i == where)) << (i + 1)
        codes[n] = np.int16(np.uint16(code))
