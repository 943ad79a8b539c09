"""Weights as sums of entries of vector codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from assay.model.bits import pack_rows, unpack_rows
from assay.model.level import STAGES, VECTOR, Level

_INDICES, _TABLES = ("weight_packed", "weight_packed_rest"), ("weight_table", "weight_table_rest")


@dataclass(frozen=True)
class PackedVectors:
    """Each `VECTOR` consecutive outputs of a column are low + span * the sum of one entry of every codebook.

    indices: uint8 [in, ceil(out / VECTOR)] of each stage; tables: [2^width, VECTOR] in the model's dtype; low, span: [in].
    rows: outputs; the last vectors are padded.
    """

    level: Level
    indices: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    low: Tensor
    span: Tensor
    rows: int

    @property
    def nbytes(self) -> int:
        return self.level.nbytes(self.rows, len(self.low), self.low.element_size())

    def decode(self) -> Tensor:
        """Weight [out, in] in the tables' dtype; summed in float32, rounded once."""
        vectors = sum((t.float()[i.long()] for t, i in zip(self.tables, self.indices, strict=True)), torch.zeros(()))
        columns = vectors.flatten(1)[:, : self.rows]
        return (self.low.float()[:, None] + self.span.float()[:, None] * columns).T.contiguous().to(self.low.dtype)

    def tensors(self) -> dict[str, Tensor]:
        widths = STAGES[self.level.bits]
        stored = {n: pack_rows(i, w) for n, i, w in zip(_INDICES, self.indices, widths, strict=False)}
        stored |= dict(zip(_TABLES, self.tables, strict=False))
        shape = torch.tensor((self.rows, len(self.low)), dtype=torch.int64)
        return stored | {"weight_low": self.low, "weight_scale": self.span, "weight_shape": shape}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedVectors:
        """Inverse of `tensors`."""
        rows, widths = int(stored["weight_shape"][0]), STAGES[level.bits]
        indices = tuple(unpack_rows(stored[n], w, -(-rows // VECTOR)) for n, w in zip(_INDICES, widths, strict=False))
        tables = tuple(stored[n] for n in _TABLES[: len(widths)])
        return cls(level, indices, tables, stored["weight_low"], stored["weight_scale"], rows)


def cut(columns: Tensor, length: int) -> Tensor:
    """Columns [..., out] as vectors [..., ceil(out / length), length], the last one filled up with zeros."""
    return pad(columns, (0, -columns.shape[-1] % length)).unflatten(-1, (-1, length))
