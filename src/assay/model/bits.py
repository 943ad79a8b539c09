"""Codes of any width as dense streams of bits, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.threads import spread


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, n] below 2**bits -> int32 [rows, ceil(n * bits / 32)].

    Each row is one little-endian bit stream, code i at bits [i * bits, (i + 1) * bits), padded
    with zeros to whole words: the dense form of compressed-tensors' `pack-quantized`.
    """
    rows, count = codes.shape
    words = torch.zeros(rows, -(-count * bits // 32), dtype=torch.int32)
    spread(_pack, rows, (bits,), (codes.contiguous(), words))
    return words


@njit(nogil=True, cache=True)
def _pack(bits: int, codes: Any, words: Any) -> None:
    for r in range(len(codes)):
        held, fill, place = np.uint64(0), 0, 0
        for i in range(codes.shape[1]):
            held |= np.uint64(codes[r, i]) << np.uint64(fill)
            fill += bits
            if fill >= 32:
                words[r, place] = np.int32(held & np.uint64(0xFFFFFFFF))
                held >>= np.uint64(32)
                fill, place = fill - 32, place + 1
        if fill:
            words[r, place] = np.int32(held)


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, words] -> uint8 [rows, count]. Raises ValueError for too few words."""
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] * 32 < count * bits or count < 0:
        raise ValueError(f"{list(words.shape)} words of {words.dtype} don't hold {count} codes of {bits} bits a row")
    codes = torch.empty(len(words), count, dtype=torch.uint8)
    spread(_unpack, len(words), (bits,), (words.contiguous(), codes))
    return codes


@njit(nogil=True, cache=True)
def _unpack(bits: int, words: Any, codes: Any) -> None:
    mask = np.uint64((1 << bits) - 1)
    for r in range(len(codes)):
        held, fill, place = np.uint64(0), 0, 0
        for i in range(codes.shape[1]):
            if fill < bits:
                held |= np.uint64(np.uint32(words[r, place])) << np.uint64(fill)
                fill, place = fill + 32, place + 1
            codes[r, i] = np.uint8(held & mask)
            held >>= np.uint64(bits)
            fill -= bits
