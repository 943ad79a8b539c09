"""A level: how finely one weight matrix is stored, and the exact bytes that takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from assay.model.errors import InputError
from assay.model.ggml import KINDS
from assay.model.trellis import Trellis

_NAME = re.compile(r"([a-z]+)(\d+(?:\.\d+)?)-(?:g(\d+)|channel)(?:-(sym|asym))?((?:\+sparse\d*\.?\d+|\+rank\d+)*)")
SHAPE_BYTES = 16


@dataclass(frozen=True)
class Format:
    """A kind of grid as it is stored.

    bits: code widths that exist; group_sizes: None is one group per output row; scale_bytes: of one
    group's scale, None for the model's dtype; symmetric: whether levels with and without zero points exist;
    table: whose values are listed beside the codes, in float32 once a matrix or in the model's dtype once a row;
    tile: rows that share the scales of their groups; matrix_bytes: further bytes of a matrix; input_bytes: of an
    input; one_stream: whether the codes of all weights
    are one stream of bits, not those of a row; layout: what the codes are: "codes", one a weight; "planes",
    `PLANES_BASE` bits with zero points and then planes of signs with a scale a group; "salient", a sign a weight, but
    8 bits of a share (bits - 1) / 7 of them; "vectors", indices of codebooks, see `STAGES`; "lattice", 16 bits for
    eight outputs of a column; "blocks", whole blocks of a kind of ggml, see `ggml.KINDS`, whose name is the level's.
    """

    bits: tuple[float, ...]
    group_sizes: tuple[int | None, ...]
    scale_bytes: int | None = None
    symmetric: tuple[bool, ...] = (True,)
    table: Literal["none", "matrix", "row"] = "none"
    matrix_bytes: int = 0
    input_bytes: int = 0
    one_stream: bool = False
    layout: Literal["codes", "planes", "salient", "vectors", "lattice", "blocks"] = "codes"
    tile: int = 1


ANY_GROUP = (32, 64, 128, None)
FORMATS = {
    "int": Format((2, 3, 4, 5, 6, 7, 8), ANY_GROUP, symmetric=(False, True)),
    "axis": Format((2, 3, 4, 5, 6, 8), ANY_GROUP, symmetric=(False, True), matrix_bytes=1),
    "nf": Format((2, 3, 4), ANY_GROUP, table="matrix"),
    "fp": Format((4, 6, 8), ANY_GROUP, table="matrix"),
    "tile": Format((8,), (128,), table="matrix", tile=128),
    "mxfp": Format((4, 6, 8), (32,), scale_bytes=1, table="matrix"),
    "nvfp": Format((4,), (16,), scale_bytes=1, table="matrix", matrix_bytes=4),
    "pow": Format((2, 3, 4), ANY_GROUP, table="matrix"),
    "ternary": Format((2,), ANY_GROUP, table="matrix"),
    "binary": Format((1,), ANY_GROUP, table="matrix"),
    "power": Format((2, 3, 4, 5, 6), ANY_GROUP, table="matrix"),
    "lut": Format((2, 3, 4), (None,), scale_bytes=0, table="row"),
    "trellis": Format(tuple(r / 4 for r in range(4, 25)), (None,), matrix_bytes=16, input_bytes=1, one_stream=True),
    "planes": Format((2, 3, 4, 5, 6), ANY_GROUP, layout="planes"),
    "salient": Format((1.35, 1.7, 2.4, 3.1), ANY_GROUP, layout="salient"),
    "lattice": Format((2,), (None,), layout="lattice"),
    "vector": Format((1, 1.5, 2, 2.5, 3, 4), (None,), layout="vectors"),
} | {kind: Format((facts.bits,), (facts.weights,), layout="blocks") for kind, facts in KINDS.items()}
PLANES_BASE = 2
VECTOR = 4
STAGES: dict[float, tuple[int, ...]] = {1: (4,), 1.5: (6,), 2: (8,), 2.5: (6, 4), 3: (6, 6), 4: (8, 8)}
"""Of a vector format's bits: the widths of the indices, one codebook of vectors of `VECTOR` weights each."""


@dataclass(frozen=True)
class Level:
    """Codes of `bits` per weight on the grid of a format, one scale per group of inputs.

    `group_size` None means one group per output row ("channel"). Asymmetric integer levels store a zero point
    of `bits` bits per group as well. sparse: the share of weights kept exactly beside the codes; rank: of a
    low-rank product added to them.
    """

    bits: float
    group_size: int | None = 64
    symmetric: bool = False
    format: str = "int"
    sparse: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        kind = FORMATS.get(self.format)
        if kind is None:
            raise InputError(f"unknown format {self.format!r}; there are {', '.join(FORMATS)}")
        if self.bits not in kind.bits:
            raise InputError(f"unknown level: {self.format} has {', '.join(f'{b:g}' for b in kind.bits)} bits, not {self.bits:g}")
        if self.symmetric not in kind.symmetric:
            raise InputError(f"{self.format} levels are symmetric")
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"a group holds at least one weight, not {self.group_size}")
        if not 0 <= self.sparse < 0.5 or self.rank < 0:
            raise InputError("a level keeps a share of 0 to 0.5 of its weights exact, and a rank of 0 or more")
        if kind.layout == "blocks" and (self.group_size not in kind.group_sizes or self.sparse or self.rank):
            raise InputError(f"{self.format} has blocks of {kind.group_sizes[0]} weights, and no terms beside them")

    def __lt__(self, other: Level) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[object, ...]:
        return self.bits, -(self.group_size or 1 << 30), self.symmetric, self.format, self.sparse, self.rank

    @property
    def name(self) -> str:
        if FORMATS[self.format].layout == "blocks":
            return self.format
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        sign = ("-sym" if self.symmetric else "-asym") if len(FORMATS[self.format].symmetric) > 1 else ""
        extra = (f"+sparse{Decimal(str(self.sparse)):f}" if self.sparse else "") + (f"+rank{self.rank}" if self.rank else "")
        return f"{self.format}{self.bits:g}-{group}{sign}{extra}"

    @classmethod
    def parse(cls, name: str) -> Level:
        """Inverse of `name`. Raises InputError for anything else."""
        if name in KINDS:
            return cls(KINDS[name].bits, KINDS[name].weights, True, name)
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in FORMATS or (match[4] is None) != (FORMATS[match[1]].symmetric == (True,)):
            raise InputError(f"unknown level {name!r}; a level looks like int4-g64-asym, int8-channel-sym or nf4-g64")
        kind, bits, group, sign, extra = match.groups()
        level = cls(float(bits) if "." in bits else int(bits), int(group) if group else None, sign != "asym", kind)
        for word in extra.split("+")[1:]:
            level = replace(level, rank=int(word[4:])) if word.startswith("rank") else replace(level, sparse=float(word[6:]))
        return level

    @property
    def base(self) -> Level:
        """The level of the codes alone."""
        return replace(self, sparse=0.0, rank=0) if self.sparse or self.rank else self

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights. Raises InputError if they don't divide."""
        size = self.group_size or columns
        if columns < 1:
            raise InputError(f"no groups in rows of {columns} inputs")
        if FORMATS[self.format].layout == "blocks" and columns % size:
            raise InputError(f"{self.format} cuts rows into blocks of {size} weights, which do not divide {columns} inputs")
        if columns % size:
            fits = [g for g in (32, 64, 128) if columns % g == 0]
            hint = f"sizes that fit: {', '.join(map(str, fits)) or 'none'}, or channel"
            raise InputError(f"group size {size} does not divide {columns} inputs; {hint}")
        return columns // size

    def kept(self, rows: int, columns: int) -> int:
        """How many weights are stored exactly."""
        return round(self.sparse * rows * columns)

    def nbytes(self, rows: int, columns: int, scale_itemsize: int = 2) -> int:
        """Exact bytes of a [rows, columns] weight: codes, parameters, padding, shape, exact weights, low-rank factors."""
        if FORMATS[self.format].layout == "blocks":
            return rows * self.groups(columns) * KINDS[self.format].nbytes
        factors = self.rank * (rows + columns) * scale_itemsize
        exact = sparse_nbytes(self.kept(rows, columns), rows, columns, scale_itemsize) if self.sparse else 0
        body = {
            "codes": self._codes,
            "planes": self._planes,
            "salient": self._salient,
            "vectors": self._vectors,
            "lattice": self._lattice,
        }
        return body[FORMATS[self.format].layout](rows, columns, scale_itemsize) + SHAPE_BYTES + factors + exact

    def salient(self, rows: int, columns: int) -> int:
        """How many weights a salient format stores in 8 bits."""
        return round((self.bits - 1) / 7 * rows * columns)

    def _codes(self, rows: int, columns: int, scale_itemsize: int) -> int:
        kind, groups = FORMATS[self.format], self.groups(columns)
        codes = 4 * (Trellis.of_rate(self.bits).words(rows * columns) if kind.one_stream else rows * words(columns, self.bits))
        scales = -(-rows // kind.tile) * groups * (scale_itemsize if kind.scale_bytes is None else kind.scale_bytes)
        zeros = 0 if self.symmetric else words(rows, self.bits) * groups * 4
        tables = {"none": 0, "matrix": 4, "row": rows * scale_itemsize}[kind.table] * 2 ** int(self.bits)
        return codes + scales + zeros + tables + kind.matrix_bytes + kind.input_bytes * columns

    def _planes(self, rows: int, columns: int, scale_itemsize: int) -> int:
        groups, planes = self.groups(columns), int(self.bits) - PLANES_BASE
        codes = rows * words(columns, PLANES_BASE) * 4 + words(rows, PLANES_BASE) * groups * 4
        return codes + planes * rows * words(columns, 1) * 4 + (1 + planes) * rows * groups * scale_itemsize

    def _salient(self, rows: int, columns: int, scale_itemsize: int) -> int:
        kept = self.salient(rows, columns)
        places, signs = rows * words(columns, 1) * 4, words(rows * columns - kept, 1) * 4
        return places + signs + kept + 2 * rows * self.groups(columns) * scale_itemsize + rows * (scale_itemsize + 1)

    def _vectors(self, rows: int, columns: int, scale_itemsize: int) -> int:
        indices = sum(columns * words(-(-rows // VECTOR), width) * 4 for width in STAGES[self.bits])
        books = sum(VECTOR * 2**width for width in STAGES[self.bits])
        return indices + (books + 2 * columns) * scale_itemsize

    def _lattice(self, rows: int, columns: int, scale_itemsize: int) -> int:
        return columns * -(-rows // 8) * 2 + rows * scale_itemsize + 8


def words(count: int, bits: float) -> int:
    """32-bit words that hold `count` codes of a whole number of bits."""
    return -(-count * int(bits) // 32)


def sparse_nbytes(kept: int, rows: int, columns: int, itemsize: int) -> int:
    """Bytes of `kept` exact weights in compressed rows: a column index and a value each, and where rows start."""
    return kept * ((2 if columns <= 1 << 16 else 4) + itemsize) + (rows + 1) * 4
