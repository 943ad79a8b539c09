"""Lossless bf16: a Huffman code for the exponents, sign and mantissa as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model import huffman
from assay.model.errors import InputError
from assay.model.threads import spread

PARTS = ("exponents", "chunk_bytes", "code_lengths", "sign_mantissa", "shape")
_DTYPES = {
    "exponents": torch.uint8, "chunk_bytes": torch.int16, "code_lengths": torch.uint8,
    "sign_mantissa": torch.uint8, "shape": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class PackedBfloat16:
    """A bf16 tensor of n numbers, any shape and any bits, in about 11 of 16 bits.

    exponents: uint8, the Huffman stream of bits 14..7; chunk_bytes: int16 [ceil(n / huffman.CHUNK)];
    code_lengths: uint8 [256]; sign_mantissa: uint8 [n], bit 15 above bits 6..0; shape: int64 [dimensions].
    Source: "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float"
    (DFloat11, 2025), whose chunks of a few codes for GPU threads are replaced by longer ones.
    """

    exponents: Tensor
    chunk_bytes: Tensor
    code_lengths: Tensor
    sign_mantissa: Tensor
    shape: Tensor

    @property
    def nbytes(self) -> int:
        """Stream + 2 * chunks + 256 + n + 8 * dimensions."""
        return sum(t.nbytes for t in self.tensors().values())

    @classmethod
    def encode(cls, tensor: Tensor) -> PackedBfloat16:
        """Pack bf16 of any shape. Raises ValueError for another dtype."""
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"DFloat11 packs bfloat16, not {tensor.dtype}")
        bits = tensor.detach().cpu().contiguous().view(-1).view(torch.int16)
        exponents, rest = torch.empty_like(bits, dtype=torch.uint8), torch.empty_like(bits, dtype=torch.uint8)
        if len(bits):
            spread(_split, len(bits), (), (bits, exponents, rest))
        lengths = huffman.code_lengths(exponents.bincount(minlength=256))
        stream, sizes = huffman.encode(exponents, lengths)
        return cls(stream, sizes, lengths, rest, torch.tensor(tensor.shape, dtype=torch.int64))

    def decode(self) -> Tensor:
        """The tensor that was encoded, bit for bit. Raises InputError if the parts don't belong together."""
        shape = self.shape.tolist()
        count = math.prod(shape)
        if min(shape, default=0) < 0 or count != len(self.sign_mantissa):
            raise InputError(f"DFloat11: {len(self.sign_mantissa)} signs for shape {shape}; {huffman.AGAIN}")
        exponents = huffman.decode(self.exponents, self.chunk_bytes, self.code_lengths, count)
        bits = torch.empty(count, dtype=torch.int16)
        if count:
            spread(_join, count, (), (exponents, self.sign_mantissa, bits))
        return bits.view(torch.bfloat16).view(shape)

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by the suffix that follows the tensor's name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> PackedBfloat16:
        """Inverse of `tensors`. Raises InputError if a part is missing or of another kind."""
        for name, dtype in _DTYPES.items():
            if name not in stored or stored[name].dtype != dtype or stored[name].dim() != 1:
                raise InputError(f"DFloat11: no {name!r} of one dimension and {dtype}; {huffman.AGAIN}")
        return cls(**{name: stored[name] for name in _DTYPES})


@njit(nogil=True, cache=True)
def _split(bits: Any, exponents: Any, rest: Any) -> None:
    for i in range(len(bits)):
        exponents[i] = np.uint8((bits[i] >> 7) & 0xFF)
        rest[i] = np.uint8((bits[i] >> 8) & 0x80 | bits[i] & 0x7F)


@njit(nogil=True, cache=True)
def _join(exponents: Any, rest: Any, bits: Any) -> None:
    for i in range(len(bits)):
        bits[i] = np.int16((rest[i] & 0x80) << 8 | exponents[i] << 7 | rest[i] & 0x7F)
