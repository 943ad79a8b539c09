"""Trellis-coded quantization: the bit stream whose decoded sequence is nearest, found by a Viterbi search.

The code itself, and how to read it, is `assay.model.trellis`. Distortion on a unit Gaussian, sequences of 4096,
against 2^(-2 rate): 0.0687, 0.0175, 0.0045 at 2, 3, 4 bits with the default states of 12 bits; a scalar quantizer
(`lloyd_max`) has 0.1175, 0.0345, 0.0095. `scripts/search_trellis.py` measures it.

Source: Trellis Coded Quantization of memoryless and Gauss-Markov sources (Marcellin and Fischer, 1990); QTIP (Tseng
et al., 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.grid._trellis import encode_rows
from assay.model.finite import finite
from assay.model.threads import spread
from assay.model.trellis import Trellis

MEMORIES_DECIDED = 64
MEMORIES_ROUND_SEAM = 16
"""How far the search looks, in memories of the code (steps until a bit has left the state).

After 64 all good paths have mostly one past; where they haven't, the search is repeated with more, so this is a
matter of speed alone. Around the seam, more than 16 gained at most 0.003 bit at length 256, 0.0005 from 1024 on.
"""


class Encoded(NamedTuple):
    """Sequences as a trellis code holds them."""

    stream: Tensor
    """int32 [n, words], what `Trellis.decode` reads."""
    values: Tensor
    """float32 [n, length], what it reads from it, bit for bit."""


def encode(trellis: Trellis, sequences: Tensor, weight: Tensor | None = None) -> Encoded:
    """The stream of each sequence [n, length] that minimises sum weight (sequence - value)^2.

    sequences: of about unit variance. weight: [n, length], not negative; None: all equal. Computed in float32, on the CPU.

    The path is optimal for the state where its end meets its start; that state is the one that an optimal path from
    the last weights on into the first ones passes. Against a free start, whose state would have to be stored, the
    round costs less: at 2 bits and 12-bit states 0.066, 0.030, 0.007, 0.0020 bit a weight for lengths 128, 256, 1024,
    4096, and storing the state 0.078, 0.039, 0.010, 0.0024.

    Each sequence is encoded alone, spread over threads: their number changes nothing.
    Raises ValueError for other shapes, for NaN or infinity and for negative weights, InputError for sequences too
    short for the trellis.
    """
    if sequences.dim() != 2 or (weight is not None and weight.shape != sequences.shape):
        shapes = [list(t.shape) for t in (sequences, weight) if t is not None]
        raise ValueError(f"a trellis encodes sequences [n, length] with weights of the same shape, not {shapes}")
    targets = sequences.detach().float().cpu().contiguous()
    prices = targets[:, :0] if weight is None else weight.detach().float().cpu().contiguous()
    if not (finite(targets) and finite(prices)) or bool((prices < 0).any()):
        raise ValueError("sequences and weights of a trellis must be finite, and weights not negative")
    count, length = targets.shape
    stream = torch.zeros(count, trellis.words(length), dtype=torch.int32)
    values = torch.empty_like(targets)
    memory = -(-trellis.state_bits // min(trellis.steps))
    shared = (
        trellis.state_bits, torch.tensor(trellis.steps).numpy(), trellis.tables().numpy(),
        MEMORIES_DECIDED * memory, MEMORIES_ROUND_SEAM * memory,
    )  # fmt: skip
    spread(encode_rows, count, shared, (targets, prices, stream, values))
    return Encoded(stream.to(sequences.device), values.to(sequences.device))


def distortion(rate: float) -> float:
    """Mean squared error that `encode` leaves of a unit Gaussian with the default states, to 2% from 1 to 6 bits."""
    return (1.066 + 0.01 * rate + 0.003 * rate * rate) * 2.0 ** (-2 * rate)
