"""Packed forms that are made of signs: planes that refine each other, and signs beside the 8-bit codes of a few."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.model.bits import pack_rows, unpack_rows
from assay.model.level import PLANES_BASE, Level
from assay.model.packed import PackedInteger


@dataclass(frozen=True)
class PackedPlanes:
    """Codes of a few bits, and planes of signs, each of which halves the step once more.

    base: of `PLANES_BASE` bits, asymmetric; signs: bool [planes, out, in], True for plus; sign_scale: [planes, out, groups]
    in the dtype of the base's scale.
    """

    level: Level
    base: PackedInteger
    signs: Tensor
    sign_scale: Tensor

    @property
    def nbytes(self) -> int:
        rows, columns = self.base.codes.shape
        return self.level.nbytes(rows, columns, self.sign_scale.element_size())

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype; summed in float32, rounded once."""
        weight = self.base.decode().float()
        for signs, scale in zip(self.signs, self.sign_scale.float(), strict=True):
            steps = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
            weight = weight + torch.where(signs, steps, -steps)
        return weight.to(self.sign_scale.dtype)

    def shortened(self, bits: int) -> PackedPlanes:
        """The same weight in fewer bits: the last planes left out."""
        planes = bits - PLANES_BASE
        return PackedPlanes(replace(self.level, bits=bits), self.base, self.signs[:planes], self.sign_scale[:planes])

    def tensors(self) -> dict[str, Tensor]:
        planes, rows, _ = self.signs.shape
        signs = pack_rows(self.signs.flatten(0, 1).to(torch.uint8), 1).unflatten(0, (planes, rows))
        return self.base.tensors() | {"weight_signs": signs, "weight_sign_scale": self.sign_scale.contiguous()}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedPlanes:
        """Inverse of `tensors`; also of a file from which the last planes were cut off."""
        base = PackedInteger.from_tensors(stored, base_level(level))
        planes, columns = int(level.bits) - PLANES_BASE, base.codes.shape[1]
        signs = stored["weight_signs"][:planes]
        unpacked = unpack_rows(signs.flatten(0, 1), 1, columns).view(*signs.shape[:2], columns)
        return cls(level, base, unpacked.bool(), stored["weight_sign_scale"][:planes])


def base_level(level: Level) -> Level:
    """What the codes below the planes are."""
    return Level(PLANES_BASE, level.group_size, False)


@dataclass(frozen=True)
class PackedSalient:
    """A sign for most weights, around a mean and at a distance a group; 8-bit codes for the salient ones.

    salient: bool [out, in]; signs: bool [out, in], True for plus, of no meaning where salient; mean, distance: [out, groups]
    in the model's dtype; codes: uint8 [kept], row by row; scale: [out], zero_point: uint8 [out], of these codes.
    """

    level: Level
    salient: Tensor
    signs: Tensor
    mean: Tensor
    distance: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def nbytes(self) -> int:
        return self.level.nbytes(self.salient.shape[0], self.salient.shape[1], self.scale.element_size())

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype; sums and products in float32, rounded once."""
        size = self.salient.shape[1] // self.mean.shape[1]
        mean, distance = (p.float().repeat_interleave(size, 1) for p in (self.mean, self.distance))
        weight = torch.where(self.signs, mean + distance, mean - distance)
        rows = self.salient.nonzero()[:, 0]
        offsets = self.codes.float() - self.zero_point.float()[rows]
        weight[self.salient] = offsets * self.scale.float()[rows]
        return weight.to(self.scale.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight_packed": pack_rows(self.salient.to(torch.uint8), 1),
            "weight_signs": pack_rows(self.signs[~self.salient][None].to(torch.uint8), 1),
            "weight_mean": self.mean.contiguous(), "weight_sign_scale": self.distance.contiguous(),
            "weight_salient": self.codes, "weight_salient_scale": self.scale.contiguous(),
            "weight_zero_point": self.zero_point.contiguous(),
            "weight_shape": torch.tensor(self.salient.shape, dtype=torch.int64),
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedSalient:
        """Inverse of `tensors`."""
        columns = int(stored["weight_shape"][1])
        salient = unpack_rows(stored["weight_packed"], 1, columns).bool()
        signs = torch.zeros_like(salient)
        signs[~salient] = unpack_rows(stored["weight_signs"], 1, int((~salient).sum()))[0].bool()
        names = ("weight_mean", "weight_sign_scale", "weight_salient", "weight_salient_scale", "weight_zero_point")
        return cls(level, salient, signs, *(stored[n] for n in names))
