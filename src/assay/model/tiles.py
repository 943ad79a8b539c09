"""Weights of a table of values whose scales are shared by square tiles, as checkpoints with FP8 in blocks store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.model.bits import pack_rows, unpack_rows
from assay.model.level import FORMATS, Level
from assay.model.packed import Tunable


@dataclass(frozen=True)
class PackedTiles:
    """Codes that index a table of values, times a scale per tile.

    codes: uint8 [out, in]; table: float32 [2^bits]; scale: [ceil(out / tile), groups] in the dtype of decoded weights.
    """

    level: Level
    codes: Tensor
    table: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        return self.level.nbytes(rows, columns, self.scale.element_size())

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype, one rounding after the product in float32."""
        return self._times(self.scale.float()).to(self.scale.dtype)

    def tunable(self) -> Tunable:
        """See `TunablePacked`; scales [tiles, groups]."""
        scale = self.scale.float()
        return Tunable(scale, scale, self._times)

    def with_numbers(self, numbers: Tensor) -> PackedTiles:
        """See `TunablePacked`."""
        return replace(self, scale=numbers.to(self.scale.dtype))

    def _times(self, scale: Tensor) -> Tensor:
        by_row = scale.repeat_interleave(FORMATS[self.level.format].tile, 0)[: len(self.codes)]
        values = self.table[self.codes.long()].unflatten(1, (scale.shape[1], -1))
        return (values * by_row[..., None]).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_rows(self.codes, int(self.level.bits)), "weight_table": self.table,
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64), "weight_scale": self.scale.contiguous(),
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedTiles:
        """Inverse of `tensors`."""
        codes = unpack_rows(stored["weight_packed"], int(level.bits), int(stored["weight_shape"][1]))
        return cls(level, codes, stored["weight_table"], stored["weight_scale"])
