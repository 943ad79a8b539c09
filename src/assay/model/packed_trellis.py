"""A weight matrix in a trellis code: every column of the rotated matrix is a stream of bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.model.level import Level, sequences
from assay.model.rotation import unrotate
from assay.model.trellis import Trellis


@dataclass(frozen=True)
class PackedTrellis:
    """Streams of a `Trellis`, a scale per row, and the seed of the rotation of the inputs.

    stream: int32 [in, words]: each column's sequences one after the other; scale: [out] in the model's dtype.
    """

    level: Level
    stream: Tensor
    scale: Tensor
    columns: int
    seed: int = 0

    @property
    def nbytes(self) -> int:
        return self.level.nbytes(len(self.scale), self.columns, self.scale.element_size())

    def values(self) -> Tensor:
        """What the streams decode to, before scales and rotation: float32 [out, in]."""
        code, parts, start = Trellis.of_rate(self.level.bits), [], 0
        for length in sequences(len(self.scale)):
            words = code.words(length)
            parts.append(code.decode(self.stream[:, start : start + words].contiguous(), length))
            start += words
        return torch.cat(parts, 1).mT

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype, one rounding at the end."""
        return unrotate(self.values() * self.scale.float()[:, None], self.seed).to(self.scale.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight_packed": self.stream, "weight_scale": self.scale, "weight_signs": torch.tensor([self.seed]),
            "weight_shape": torch.tensor([len(self.scale), self.columns]),
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedTrellis:
        """Inverse of `tensors`."""
        columns, seed = int(stored["weight_shape"][1]), int(stored["weight_signs"][0])
        return cls(level, stored["weight_packed"], stored["weight_scale"], columns, seed)
