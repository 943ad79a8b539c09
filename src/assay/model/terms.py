"""A weight as a sum of terms: codes, a low-rank product, and weights kept exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.model import memory
from assay.model.binary import PackedPlanes, PackedSalient
from assay.model.blocks import PackedBlocks
from assay.model.errors import InputError
from assay.model.lattice import PackedLattice
from assay.model.level import FORMATS, Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed, PackedAxis, PackedInteger, PackedTable, Tunable, TunablePacked
from assay.model.packed_trellis import PackedTrellis
from assay.model.tiles import PackedTiles
from assay.model.vectors import PackedVectors

SUFFIXES = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_table", "weight_global_scale",
    "weight_signs", "weight_sign_scale", "weight_mean", "weight_salient", "weight_salient_scale", "weight_packed_rest",
    "weight_table_rest", "weight_low", "weight_places", "weight_axis", "weight_g_idx",
    "weight_low_rank_out", "weight_low_rank_in", "weight_exact", "weight_exact_columns", "weight_exact_rows",
)  # fmt: skip
"""Endings of all tensors that a compressed weight may be stored in."""


@dataclass(frozen=True)
class Exact:
    """Weights that keep their value, in compressed rows.

    values: the model's dtype [kept]; columns: uint16 [kept], int32 beyond 65,536 inputs; starts: int32 [out + 1].
    """

    values: Tensor
    columns: Tensor
    starts: Tensor

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Exact:
        """Those weights [out, in] where the mask [out, in] is True."""
        columns = mask.nonzero()[:, 1]
        narrow = columns.to(torch.uint16 if weight.shape[1] <= 1 << 16 else torch.int32)
        starts = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
        return cls(weight[mask].to(dtype), narrow, starts)

    def mask(self, shape: torch.Size) -> Tensor:
        """Where they are, bool [out, in]."""
        rows = torch.repeat_interleave(torch.arange(shape[0]), self.starts.diff().long())
        found = torch.zeros(shape, dtype=torch.bool)
        found[rows, self.columns.long()] = True
        return found


@dataclass(frozen=True)
class PackedSum:
    """The codes of `base`, plus factors[0] @ factors[1] ([out, rank] and [rank, in]), with `exact` weights put in place."""

    level: Level
    base: Packed
    factors: tuple[Tensor, Tensor] | None = None
    exact: Exact | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def decode(self) -> Tensor:
        """Weight [out, in] in the dtype of the base; summed in float32, rounded once."""
        base = self.base.decode()
        weight = base.float()
        if self.factors is not None:
            weight = weight + self.factors[0].float() @ self.factors[1].float()
        weight = weight.to(base.dtype)
        if self.exact is not None:
            weight[self.exact.mask(weight.shape)] = self.exact.values
        return weight

    def tunable(self) -> Tunable | None:
        """See `TunablePacked`; scales of the base, if it has any, and then both factors, flat [count] where there are some."""
        inner = self.base.tunable() if isinstance(self.base, TunablePacked) else None
        fixed = self.base.decode().float() if inner is None else None
        if inner is None and self.factors is None:
            return None
        mask, kept = self._kept()

        def summed(numbers: Tensor) -> Tensor:
            scales, factors = self._parted(numbers)
            weight = fixed if inner is None else inner.decode(scales.view_as(inner.numbers))
            assert weight is not None
            return torch.where(mask, kept, weight if factors is None else weight + factors[0] @ factors[1])

        if self.factors is None:
            assert inner is not None
            return Tunable(inner.numbers, inner.unit, summed)
        factors = [f.float() for f in self.factors]
        sizes = [f.square().mean().sqrt().expand_as(f) for f in factors]
        whole = [] if inner is None else [inner.numbers], [] if inner is None else [inner.unit]
        numbers, unit = (torch.cat([t.flatten() for t in ts]) for ts in (whole[0] + factors, whole[1] + sizes))
        return Tunable(numbers, unit, summed)

    def with_numbers(self, numbers: Tensor) -> PackedSum:
        """See `TunablePacked`."""
        scales, factors = self._parted(numbers)
        base, inner = self.base, self.base.tunable() if isinstance(self.base, TunablePacked) else None
        if isinstance(base, TunablePacked) and inner is not None:
            base = base.with_numbers(scales.view_as(inner.numbers))
        if factors is None or self.factors is None:
            return replace(self, base=base)
        return replace(self, base=base, factors=(factors[0].to(self.factors[0].dtype), factors[1].to(self.factors[1].dtype)))

    def _parted(self, numbers: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tunable numbers as those of the base and the factors."""
        if self.factors is None:
            return numbers, None
        left, right = self.factors
        scales, first, second = numbers.split([numbers.numel() - left.numel() - right.numel(), left.numel(), right.numel()])
        return scales, (first.view_as(left), second.view_as(right))

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Where weights are exact, bool [out, in], and their values there."""
        shape = self.base.decode().shape
        mask, kept = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        if self.exact is not None:
            mask = self.exact.mask(shape)
            kept[mask] = self.exact.values.float()
        return mask, kept

    def tensors(self) -> dict[str, Tensor]:
        stored = self.base.tensors()
        if self.factors is not None:
            stored |= {"weight_low_rank_out": self.factors[0], "weight_low_rank_in": self.factors[1]}
        if self.exact is not None:
            names = ("weight_exact", "weight_exact_columns", "weight_exact_rows")
            stored |= dict(zip(names, (self.exact.values, self.exact.columns, self.exact.starts), strict=True))
        return stored


def restore(stored: Mapping[str, Tensor], level: Level, dtype: torch.dtype) -> Packed:
    """A compressed weight from its stored tensors, by suffix; dtype: of decoded weights."""
    base = _restore_codes(stored, level.base, dtype)
    if level == level.base:
        return base
    factors = (stored["weight_low_rank_out"], stored["weight_low_rank_in"]) if level.rank else None
    names = ("weight_exact", "weight_exact_columns", "weight_exact_rows")
    exact = Exact(*(stored[n] for n in names)) if "weight_exact" in stored else None
    return PackedSum(level, base, factors, exact)


def decoded(name: str, packed: Packed) -> Tensor:
    """A weight from parts that may be damaged. Raises InputError naming the weight."""
    try:
        return packed.decode()
    except (RuntimeError, IndexError, KeyError, ValueError, TypeError, OverflowError, AssertionError) as error:
        if memory.lacked(error):
            raise
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise InputError(f"{name}: its packed parts don't belong together ({reason}); download the model again") from error


def _restore_codes(stored: Mapping[str, Tensor], level: Level, dtype: torch.dtype) -> Packed:
    if level.format == "int":
        codes = PackedInteger.from_tensors(stored, level)
        return PackedOrdered.of(codes, stored["weight_g_idx"]) if "weight_g_idx" in stored else codes
    if level.format == "axis":
        return PackedAxis.from_tensors(stored, level)
    if level.format == "lattice":
        return PackedLattice.from_tensors(stored, level)
    if FORMATS[level.format].layout == "blocks":
        return PackedBlocks.from_tensors(stored, level)
    if level.format == "trellis":
        return PackedTrellis.from_tensors(stored, level)
    if level.format == "planes":
        return PackedPlanes.from_tensors(stored, level)
    if level.format == "salient":
        return PackedSalient.from_tensors(stored, level)
    if level.format == "vector":
        return PackedVectors.from_tensors(stored, level)
    if FORMATS[level.format].tile > 1:
        return PackedTiles.from_tensors(stored, level)
    return PackedTable.from_tensors(stored, level, dtype)
