"""A weight as a sum of terms: codes, a low-rank product, and weights kept exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.model.binary import PackedPlanes, PackedSalient
from assay.model.level import Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed, PackedInteger, PackedTable, Tunable, TunablePacked
from assay.model.packed_trellis import PackedTrellis
from assay.model.vectors import PackedVectors

SUFFIXES = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_table", "weight_global_scale",
    "weight_signs", "weight_sign_scale", "weight_mean", "weight_salient", "weight_salient_scale", "weight_packed_rest",
    "weight_table_rest", "weight_low", "weight_places",
    "weight_g_idx", "weight_low_rank_out", "weight_low_rank_in", "weight_exact", "weight_exact_columns", "weight_exact_rows",
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
        """See `TunablePacked`; scales of the base."""
        inner = self.base.tunable() if isinstance(self.base, TunablePacked) else None
        if inner is None:
            return None
        scales, decode = inner
        added = None if self.factors is None else self.factors[0].float() @ self.factors[1].float()
        weight = decode(scales)
        mask, kept = torch.zeros(weight.shape, dtype=torch.bool), torch.zeros_like(weight)
        if self.exact is not None:
            mask = self.exact.mask(weight.shape)
            kept[mask] = self.exact.values.float()

        def summed(scales: Tensor) -> Tensor:
            base = decode(scales)
            return torch.where(mask, kept, base if added is None else base + added)

        return scales, summed

    def with_scales(self, scales: Tensor) -> PackedSum:
        """See `TunablePacked`."""
        assert isinstance(self.base, TunablePacked)
        return replace(self, base=self.base.with_scales(scales))

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


def _restore_codes(stored: Mapping[str, Tensor], level: Level, dtype: torch.dtype) -> Packed:
    if level.format == "int":
        codes = PackedInteger.from_tensors(stored, level)
        return PackedOrdered.of(codes, stored["weight_g_idx"]) if "weight_g_idx" in stored else codes
    if level.format == "trellis":
        return PackedTrellis.from_tensors(stored, level)
    if level.format == "planes":
        return PackedPlanes.from_tensors(stored, level)
    if level.format == "salient":
        return PackedSalient.from_tensors(stored, level)
    if level.format == "vector":
        return PackedVectors.from_tensors(stored, level)
    return PackedTable.from_tensors(stored, level, dtype)
