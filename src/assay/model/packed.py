"""Compressed weights: named tensors, an exact byte count, and decoding in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.level import Level
from assay.model.threads import spread


class Packed(Protocol):
    """What every `encode` method returns for one weight matrix."""

    @property
    def nbytes(self) -> int: ...

    def decode(self) -> Tensor:
        """The weight [out, in] that a reader of the stored tensors computes with."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by the suffix that follows the module's name."""
        ...


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
    """Inverse of `pack_rows`: int32 [rows, words] -> uint8 [rows, count]."""
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


@dataclass(frozen=True)
class PackedInteger:
    """Codes on an integer grid.

    codes: uint8 [out, in], below 2**bits; scale: 16- or 32-bit float [out, groups];
    zero_point: uint8 [out, groups] (2**(bits - 1) everywhere when symmetric).
    """

    level: Level
    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        return self.level.nbytes(rows, columns, self.scale.element_size())

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype, one rounding after the product."""
        rows, columns = self.codes.shape
        groups = self.scale.shape[1]
        offset = self.codes.view(rows, groups, -1).to(torch.int16) - self.zero_point.to(torch.int16)[..., None]
        return (offset.to(self.scale.dtype) * self.scale[..., None]).view(rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        stored = {
            "weight_packed": pack_rows(self.codes, self.level.bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if not self.level.symmetric:
            zeros = pack_rows(self.zero_point.T.contiguous(), self.level.bits)
            stored["weight_zero_point"] = zeros.T.contiguous()
        return stored

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedInteger:
        """Inverse of `tensors`."""
        rows, columns = (int(n) for n in stored["weight_shape"])
        scale = stored["weight_scale"]
        if level.symmetric:
            zero_point = torch.full(scale.shape, 1 << (level.bits - 1), dtype=torch.uint8)
        else:
            zero_point = unpack_rows(stored["weight_zero_point"].T, level.bits, rows).T.contiguous()
        return cls(level, unpack_rows(stored["weight_packed"], level.bits, columns), scale, zero_point)
