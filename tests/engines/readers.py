"""Decoders of GPTQ's and AWQ's layouts written one number at a time from their description, to check ours against."""

from __future__ import annotations

import numpy as np
from torch import Tensor

AWQ_PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
"""Output within eight -> the nibble that is its: AutoAWQ packs outputs 0 2 4 6 1 3 5 7 from the lowest nibble up."""


def bits_at(words: np.ndarray, start: int, count: int) -> int:
    """Bits start ... start + count of a stream of 32-bit words."""
    return sum(int(words[b // 32] >> np.uint32(b % 32) & 1) << (b - start) for b in range(start, start + count))


def gptq(stored: dict[str, Tensor], bits: int, less_one: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes [out, in], zero points [out, in], group of each input) of one module."""
    weights, zeros = (stored[n].numpy().view(np.uint32) for n in ("qweight", "qzeros"))
    groups, columns, rows = stored["g_idx"].numpy(), len(stored["g_idx"]), weights.shape[1]
    codes = np.array([[bits_at(weights[:, o], i * bits, bits) for i in range(columns)] for o in range(rows)])
    by_group = np.array([[bits_at(zeros[g], o * bits, bits) for g in range(len(zeros))] for o in range(rows)])
    by_group = (by_group + less_one) % 2**bits
    return codes, by_group[:, groups], groups


def awq(stored: dict[str, Tensor], group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes [out, in], zero points [out, in]) of one module."""

    def unpack(words: np.ndarray) -> np.ndarray:
        found = np.empty((words.shape[1] * 8, words.shape[0]), dtype=np.int64)
        for row, column in np.ndindex(*words.shape):
            for output, nibble in AWQ_PLACES.items():
                found[8 * column + output, row] = words[row, column] >> np.uint32(4 * nibble) & 15
        return found

    codes, zeros = (unpack(stored[n].numpy().view(np.uint32)) for n in ("qweight", "qzeros"))
    return codes, zeros.repeat(group_size, 1)
