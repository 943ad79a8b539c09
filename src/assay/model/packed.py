"""Compressed weights: named tensors, an exact byte count, and decoding in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from assay.model.bits import pack_rows, unpack_rows
from assay.model.level import Level


class Packed(Protocol):
    """What every `encode` method returns for one weight matrix [out, in]."""

    @property
    def level(self) -> Level: ...

    @property
    def nbytes(self) -> int:
        """Exact bytes of the stored tensors."""
        ...

    def decode(self) -> Tensor:
        """The weight [out, in] that a reader of the stored tensors computes with."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by the suffix that follows the module's name."""
        ...


class Tunable(NamedTuple):
    """What of a compressed weight is in floating point: scales, minima and low-rank factors.

    numbers: float32; unit: of the same shape, the size in which a change of each is measured; decode: the differentiable
    function from such numbers to the weight [out, in], float32; dtype: in which they are stored, None for the model's.
    """

    numbers: Tensor
    unit: Tensor
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None


@runtime_checkable
class TunablePacked(Packed, Protocol):
    """A compressed weight whose scales and factors can be tuned while its codes stay."""

    def tunable(self) -> Tunable | None:
        """None where this weight has none in floating point."""
        ...

    def with_numbers(self, numbers: Tensor) -> Packed:
        """The same codes with other numbers, float32 in the shape of the tunable ones, rounded to their stored dtype."""
        ...


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
        return (self._offsets().to(self.scale.dtype) * self.scale[..., None]).flatten(1)

    def tunable(self) -> Tunable:
        """See `TunablePacked`; scales [out, groups]."""
        offsets, scale = self._offsets().float(), self.scale.float()
        return Tunable(scale, scale, lambda scales: (offsets * scales[..., None]).flatten(1))

    def with_numbers(self, numbers: Tensor) -> PackedInteger:
        """See `TunablePacked`."""
        return replace(self, scale=numbers.to(self.scale.dtype))

    def _offsets(self) -> Tensor:
        """Codes above their zero point, int16 [out, groups, group size]."""
        codes = self.codes.view(*self.scale.shape, -1)
        return codes.to(torch.int16) - self.zero_point.to(torch.int16)[..., None]

    def tensors(self) -> dict[str, Tensor]:
        stored = {
            "weight_packed": pack_rows(self.codes, int(self.level.bits)),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        if not self.level.symmetric:
            zeros = pack_rows(self.zero_point.T.contiguous(), int(self.level.bits))
            stored["weight_zero_point"] = zeros.T.contiguous()
        return stored

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedInteger:
        """Inverse of `tensors`."""
        rows, columns = (int(n) for n in stored["weight_shape"])
        scale = stored["weight_scale"]
        if level.symmetric:
            zero_point = torch.full(scale.shape, 1 << (int(level.bits) - 1), dtype=torch.uint8)
        else:
            zero_point = unpack_rows(stored["weight_zero_point"].T, int(level.bits), rows).T.contiguous()
        return cls(level, unpack_rows(stored["weight_packed"], int(level.bits), columns), scale, zero_point)


@dataclass(frozen=True)
class PackedAxis:
    """Codes on an integer grid whose groups run along the inputs of a row, or along the outputs of a column.

    inner: those of the weight [out, in], or of its transpose if `by_input`. Both take the same bytes, see `fits`.
    """

    level: Level
    inner: PackedInteger
    by_input: bool

    @staticmethod
    def fits(level: Level, rows: int, columns: int) -> bool:
        """Whether groups along the outputs divide them, and take as many bytes as groups along the inputs."""
        base = replace(level, format="int")
        even = level.group_size is None or rows % level.group_size == 0
        return even and base.nbytes(rows, columns) == base.nbytes(columns, rows)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes + 1

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype."""
        weight = self.inner.decode()
        return weight.T.contiguous() if self.by_input else weight

    def tunable(self) -> Tunable:
        """See `TunablePacked`; scales of the inner codes."""
        found = self.inner.tunable()
        return found._replace(decode=lambda scales: found.decode(scales).T) if self.by_input else found

    def with_numbers(self, numbers: Tensor) -> PackedAxis:
        """See `TunablePacked`."""
        return replace(self, inner=self.inner.with_numbers(numbers))

    def tensors(self) -> dict[str, Tensor]:
        stored, rows = self.inner.tensors(), torch.tensor([self.by_input], dtype=torch.uint8)
        shape = stored["weight_shape"].flip(0) if self.by_input else stored["weight_shape"]
        return stored | {"weight_shape": shape, "weight_axis": rows}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedAxis:
        """Inverse of `tensors`."""
        by_input, shape = bool(stored["weight_axis"]), stored["weight_shape"]
        inner = {**stored, "weight_shape": shape.flip(0) if by_input else shape}
        return cls(level, PackedInteger.from_tensors(inner, replace(level, format="int")), by_input)


@dataclass(frozen=True)
class PackedTable:
    """Codes that index a table of values, times a scale per group.

    codes: uint8 [out, in]; table: float32 [2^bits], or [out, 2^bits] in the model's dtype; scale: [out, groups] in
    the model's dtype, as uint8 exponents (2^(scale - 127)) or as float8 of which `global_scale` float32 [1] is
    the unit; None for a table per row. dtype: of decoded weights.
    """

    level: Level
    codes: Tensor
    table: Tensor
    dtype: torch.dtype
    scale: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        return self.level.nbytes(rows, columns, self.dtype.itemsize)

    def decode(self) -> Tensor:
        """Weight [out, in] in `dtype`, one rounding after the product in float32."""
        if self.scale is None:
            return self.table.gather(1, self.codes.long()).to(self.dtype)
        scale = self.float_scale()
        values = self.table[self.codes.long()].unflatten(1, (scale.shape[1], -1))
        return (values * scale[..., None]).flatten(1).to(self.dtype)

    def tunable(self) -> Tunable | None:
        """See `TunablePacked`; scales [out, groups], where they are in the model's dtype."""
        if self.scale is None or self.scale.dtype != self.dtype:
            return None
        values, scale = self.table[self.codes.long()].unflatten(1, (self.scale.shape[1], -1)), self.scale.float()
        return Tunable(scale, scale, lambda scales: (values * scales[..., None]).flatten(1))

    def with_numbers(self, numbers: Tensor) -> PackedTable:
        """See `TunablePacked`."""
        return replace(self, scale=numbers.to(self.dtype))

    def float_scale(self) -> Tensor:
        """What the table is multiplied with, float32 [out, groups]."""
        assert self.scale is not None
        if self.scale.dtype == torch.uint8:
            return torch.ldexp(torch.ones_like(self.scale, dtype=torch.float32), self.scale.int() - 127)
        return self.scale.float() if self.global_scale is None else self.scale.float() * self.global_scale

    def tensors(self) -> dict[str, Tensor]:
        stored = {
            "weight_packed": pack_rows(self.codes, int(self.level.bits)),
            "weight_table": self.table,
            "weight_shape": torch.tensor(self.codes.shape, dtype=torch.int64),
        }
        optional = {"weight_scale": self.scale, "weight_global_scale": self.global_scale}
        return stored | {k: v.contiguous() for k, v in optional.items() if v is not None}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level, dtype: torch.dtype) -> PackedTable:
        """Inverse of `tensors`."""
        columns = int(stored["weight_shape"][1])
        codes = unpack_rows(stored["weight_packed"], int(level.bits), columns)
        scales = stored.get("weight_scale"), stored.get("weight_global_scale")
        return cls(level, codes, stored["weight_table"], dtype, *scales)
