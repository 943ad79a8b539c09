"""A level: how finely one weight matrix is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass

from assay.model.errors import InputError

_NAME = re.compile(r"int([2-8])-(?:g(\d+)|channel)-(sym|asym)")


@dataclass(frozen=True)
class Level:
    """An integer grid of `bits` per weight with one scale per group of inputs.

    `group_size` None means one group per output row ("channel"). Asymmetric levels store an
    integer zero point of `bits` bits per group as well.
    """

    bits: int
    group_size: int | None = 64
    symmetric: bool = False

    def __lt__(self, other: Level) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int, bool]:
        return self.bits, -(self.group_size or 1 << 30), self.symmetric

    @property
    def name(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, name: str) -> Level:
        """Inverse of `name`. Raises InputError for anything else."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"unknown level {name!r}; a level looks like int4-g64-asym or int8-channel-sym")
        bits, group, kind = match.groups()
        return cls(int(bits), int(group) if group else None, kind == "sym")

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights. Raises InputError if they don't divide."""
        size = self.group_size or columns
        if columns % size:
            fits = [g for g in (32, 64, 128) if columns % g == 0]
            hint = f"sizes that fit: {', '.join(map(str, fits)) or 'none'}, or channel"
            raise InputError(f"group size {size} does not divide {columns} inputs; {hint}")
        return columns // size

    def nbytes(self, rows: int, columns: int, scale_itemsize: int = 2) -> int:
        """Exact bytes of a [rows, columns] weight at this level: codes, scales, zero points, padding, shape."""
        groups = self.groups(columns)
        codes = rows * _words(columns, self.bits) * 4
        zeros = 0 if self.symmetric else _words(rows, self.bits) * groups * 4
        return codes + rows * groups * scale_itemsize + zeros + SHAPE_BYTES


SHAPE_BYTES = 16


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
