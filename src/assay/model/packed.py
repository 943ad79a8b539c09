"""Compressed weights: named tensors, an exact byte count, and decoding in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from assay.model.level import Level


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
    words = -(-count * bits // 32)
    stream = np.unpackbits(codes.numpy()[..., None], axis=-1, count=bits, bitorder="little")
    padded = np.zeros((rows, words * 32), dtype=np.uint8)
    padded[:, : count * bits] = stream.reshape(rows, count * bits)
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view(np.int32))


def unpack_rows(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, words] -> uint8 [rows, count]."""
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)
    stream = np.unpackbits(raw, axis=-1, count=count * bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(len(raw), count, bits), axis=-1, bitorder="little")[..., 0])


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
