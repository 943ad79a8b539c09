"""A weight matrix in a trellis code: rotated on both sides, and read along its antidiagonals as one stream of bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.level import Level
from assay.model.packed import Tunable
from assay.model.rotation import unrotate
from assay.model.trellis import Trellis


@dataclass(frozen=True)
class PackedTrellis:
    """The stream of a `Trellis`, a scale per row, and in which order the weights follow each other.

    stream: int32 [words]; scale: [out] in the model's dtype; places: uint8 [in], columns are visited by rising
    place, then index; seed: of both rotations; upwards: whether an antidiagonal starts at its last row.
    """

    level: Level
    stream: Tensor
    scale: Tensor
    places: Tensor
    seed: int
    upwards: bool

    @property
    def nbytes(self) -> int:
        return self.level.nbytes(len(self.scale), len(self.places), self.scale.element_size())

    def values(self) -> Tensor:
        """What the stream decodes to, before scales and rotations: float32 [out, in]."""
        code, order = Trellis.of_rate(self.level.bits), visiting_order(self.places)
        values = torch.empty(len(self.scale), len(order))
        steps, tables = torch.tensor(code.steps).numpy(), code.tables().numpy()
        _read(code.state_bits, steps, tables, self.stream.numpy(), self.upwards, values.numpy())
        return torch.empty_like(values).index_copy_(1, order, values)

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype, one rounding at the end."""
        turned = self.values() * self.scale.float()[:, None]
        return unrotate(unrotate(turned, self.seed).mT, self.seed).mT.to(self.scale.dtype).contiguous()

    def tunable(self) -> Tunable:
        """See `TunablePacked`; scales [out]."""
        rows, scale = unrotate(self.values(), self.seed), self.scale.float()
        return Tunable(scale, scale, lambda scales: unrotate((rows * scales[:, None]).mT, self.seed).mT)

    def with_numbers(self, numbers: Tensor) -> PackedTrellis:
        """See `TunablePacked`."""
        return replace(self, scale=numbers.to(self.scale.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight_packed": self.stream, "weight_scale": self.scale, "weight_places": self.places,
            "weight_signs": torch.tensor([self.seed, int(self.upwards)]),
            "weight_shape": torch.tensor([len(self.scale), len(self.places)]),
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedTrellis:
        """Inverse of `tensors`. Raises ValueError for a stream that is too short for the weight."""
        seed, upwards = stored["weight_signs"].tolist()
        needed = Trellis.of_rate(level.bits).words(len(stored["weight_scale"]) * len(stored["weight_places"]))
        if stored["weight_packed"].dtype != torch.int32 or stored["weight_packed"].shape != (needed,):
            raise ValueError(f"{needed} words of int32 needed, not {list(stored['weight_packed'].shape)}")
        return cls(level, stored["weight_packed"], stored["weight_scale"], stored["weight_places"], seed, bool(upwards))


def place_of(rank: Tensor) -> Tensor:
    """Ranks [n] (a permutation) as uint8 places: exact up to 256 columns, beyond that in 256 classes."""
    return (rank * min(256, len(rank)) // len(rank)).to(torch.uint8)


def visiting_order(places: Tensor) -> Tensor:
    """Indices of the columns in the order that places [n] stand for."""
    return places.int().argsort(stable=True)


@njit(nogil=True, cache=True)
def _read(bits: int, steps: Any, tables: Any, words: Any, upwards: bool, values: Any) -> None:
    """Fill values [out, in] along the antidiagonals; the state before the first step is 0."""
    down, across = values.shape
    state, count, held, fill, word = np.uint64(0), 0, np.uint64(0), 0, 0
    mask = np.uint64((1 << bits) - 1)
    for wave in range(down + across - 1):
        first, last = max(0, wave - across + 1), min(down - 1, wave)
        for a in range(last - first + 1):
            i = last - a if upwards else first + a
            phase = count % len(steps)
            k = steps[phase]
            if fill < k:
                held = (held << np.uint64(32)) | np.uint64(np.uint32(words[word]))
                fill, word = fill + 32, word + 1
            fill -= k
            fresh = (held >> np.uint64(fill)) & np.uint64((1 << k) - 1)
            state = ((state << np.uint64(k)) | fresh) & mask
            values[i, wave - i] = tables[phase, state]
            count += 1
