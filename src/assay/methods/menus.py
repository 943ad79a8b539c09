"""The levels that methods offer to a plan, for rows of so many weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from assay.model.ggml import KINDS
from assay.model.level import FORMATS, Level

INTEGER_BITS = (2, 3, 4, 5, 6, 8)
SYMMETRIC_BITS = (4, 8)
GROUPS: tuple[int | None, ...] = (32, 64, 128, None)
SCALARS = ("int", "nf", "fp", "mxfp", "nvfp", "pow", "ternary", "binary")
"""Formats whose grids are fixed values times a scale: every solver of single weights takes them."""
TILES = ("tile",)
"""Formats of which rows share scales: for solvers that fit scales only through the grid."""
BLOCKS = tuple(KINDS)
"""Formats of whole blocks; the solvers that take them are in `solve/blocks.py`."""
LONG_BLOCKS = (
    "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "iq3_s", "iq3_xxs", "q2_k", "iq2_s", "iq2_xs", "iq2_xxs",
)  # fmt: skip
SHORT_BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl")
"""What a plan chooses from where rows are whole blocks of 256 weights, and where they aren't."""
STAND_INS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Short blocks that lose no more than a kind of long ones; for every other kind it is iq4_nl."""


def integers(columns: int) -> list[Level]:
    """Evenly spaced levels; symmetric ones only at the widths that engines want them for."""
    found = (Level(b, g, s) for b in INTEGER_BITS for g in GROUPS for s in (False, True) if not s or b in SYMMETRIC_BITS)
    return _fitting(found, columns)


def symmetric(columns: int) -> list[Level]:
    """Evenly spaced levels around zero."""
    return _fitting((Level(b, g, True) for b in INTEGER_BITS for g in GROUPS), columns)


def of_format(name: str, columns: int) -> list[Level]:
    """Every level of a format."""
    if name == "int":
        return integers(columns)
    kind = FORMATS[name]
    return _fitting((Level(b, g, True, name) for b in kind.bits for g in kind.group_sizes), columns)


def _fitting(levels: Iterable[Level], columns: int) -> list[Level]:
    return [x for x in levels if x.group_size is None or (columns % x.group_size == 0 and x.group_size < columns)]


def blocks(columns: int) -> list[Level]:
    """Block formats, none where rows are no whole blocks."""
    names = LONG_BLOCKS if columns % 256 == 0 else SHORT_BLOCKS
    return [x for x in map(Level.parse, names) if columns % (x.group_size or 1) == 0]


def stand_in(level: Level, columns: int) -> Level:
    """The level itself, or, where it is of blocks that don't divide the rows, the one that takes its place.

    llama.cpp's own quantizer makes the same choice.
    """
    if level.format not in KINDS or columns % (level.group_size or 1) == 0:
        return level
    return Level.parse(STAND_INS.get(level.format, "iq4_nl"))


def with_sparse(levels: Iterable[Level], share: float) -> list[Level]:
    """The same levels with a share of the weights kept exactly."""
    return [replace(x, sparse=share) for x in levels]


def with_rank(levels: Iterable[Level], rank: int) -> list[Level]:
    """The same levels with a low-rank product added."""
    return [replace(x, rank=rank) for x in levels]
