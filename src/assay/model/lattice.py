"""A finite E8 lattice codebook: eight weights in sixteen bits.

E8 moved by a quarter along the diagonal is the half-odd vectors with an even sum, each moved by +1/4 or by -1/4. A
codebook entry is thus a pattern of absolute values (227 with squared norm up to 10, and 29 of the 224 with 12), the
signs of seven of them (the parity of the sum gives the eighth), and which way it is moved: 8 + 7 + 1 bits, and a table
of 256 patterns. Source: E8P of QuIP# (Tseng et al., 2024); which 29 patterns is our choice.

Measured mean squared error on a unit Gaussian: 0.0912, and 0.0891 with the shells of the table pulled apart as below,
which costs nothing. From memory of QTIP (Tseng et al., 2024), E8P has 0.089; a scalar quantizer has 0.1175, the default
trellis 0.0687.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from assay.model.level import Level
from assay.model.packed import Tunable
from assay.model.rotation import unrotate

SIZE = 8
SCALE = 0.945
"""Spacing of the lattice with the least error on a unit Gaussian."""
STRETCH = 0.07
"""Patterns of squared norm 10 and 12 are longer by so much, shorter ones shorter: their cells' means lie there."""
SHIFT = 0.25
DISTORTION = 0.0891
"""Mean squared error on a unit Gaussian."""


@dataclass(frozen=True)
class PackedLattice:
    """A weight rotated on both sides, each 8 consecutive outputs of a column one entry of the codebook, a scale per row.

    codes: int16 [in, ceil(out / 8)], the last entries are cut off; scale: [out] in the model's dtype; seed: of both
    rotations.
    """

    level: Level
    codes: Tensor
    scale: Tensor
    seed: int

    @property
    def nbytes(self) -> int:
        return self.level.nbytes(len(self.scale), len(self.codes), self.scale.element_size())

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype, one rounding at the end."""
        return self.tunable().decode(self.scale.float()).to(self.scale.dtype).contiguous()

    def tunable(self) -> Tunable:
        """See `TunablePacked`; scales [out]."""
        rows, scale = unrotate(decode(self.codes)[:, : len(self.scale)].T, self.seed), self.scale.float()
        return Tunable(scale, scale, lambda scales: unrotate((rows * scales[:, None]).mT, self.seed).mT)

    def with_numbers(self, numbers: Tensor) -> PackedLattice:
        """See `TunablePacked`."""
        return replace(self, scale=numbers.to(self.scale.dtype))

    def tensors(self) -> dict[str, Tensor]:
        shape = torch.tensor([len(self.scale), len(self.codes)])
        return {
            "weight_packed": self.codes, "weight_scale": self.scale, "weight_shape": shape,
            "weight_signs": torch.tensor([self.seed]),
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedLattice:
        """Inverse of `tensors`."""
        return cls(level, stored["weight_packed"], stored["weight_scale"], int(stored["weight_signs"]))


def decode(codes: Tensor) -> Tensor:
    """The numbers that codes int16 [n, length / 8] stand for, float32 [n, length]."""
    return codebook().to(codes.device)[codes.long() & 0xFFFF].flatten(1)


@cache
def codebook() -> Tensor:
    """All entries by code, float32 [65536, 8]: bits 15..8 the pattern, 7..1 the signs of numbers 0..6, 0 the shift."""
    code = torch.arange(1 << 16)
    negative = code[:, None] >> torch.arange(1, SIZE) & 1
    last = (half_odd()[code >> 8].sum(1).long() + negative.sum(1)) % 2
    signs = 1 - 2 * torch.cat((negative, last[:, None]), 1)
    return (signs * patterns()[code >> 8] + SHIFT * (1 - 2 * (code[:, None] & 1))) * SCALE


def patterns() -> Tensor:
    """Absolute values before they are moved, float32 [256, 8], in units of the spacing."""
    plain = half_odd()
    outer = plain.square().sum(1, keepdim=True) > 9
    return plain * torch.where(outer, 1 + STRETCH, 1 - STRETCH)


@cache
def half_odd() -> Tensor:
    """Absolute values of the lattice's vectors before they are moved, float32 [256, 8], in units of its spacing.

    Of the longest every 224 / 29th in lexical order.
    """
    halves = [p for p in product((0.5, 1.5, 2.5), repeat=SIZE) if sum(v * v for v in p) <= 12]
    inner = [p for p in halves if sum(v * v for v in p) <= 10]
    outer = [p for p in halves if sum(v * v for v in p) == 12]
    missing = 256 - len(inner)
    return torch.tensor(inner + [outer[i * len(outer) // missing] for i in range(missing)])
