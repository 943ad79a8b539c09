"""Menus: for every decision the options worth having, each with its bytes and its damage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from assay.model.errors import InputError
from assay.model.level import Level


@dataclass(frozen=True)
class SiteRow:
    """What planning needs to know of a site. stored_bytes: in the source; scale_itemsize: bytes of one scale."""

    name: str
    role: str
    block: int | None
    shape: tuple[int, int]
    stored_bytes: int
    scale_itemsize: int
    transposed: bool = False
    expert: int | None = None
    stacked: bool = False

    @property
    def count(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Option:
    """One way to store a decision's sites. level None: as they are; damage: nats per token."""

    level: str | None
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Decision:
    """Sites decided together. count: weights; inside: within the blocks; options: by rising bytes, keeping last."""

    name: str
    sites: tuple[str, ...]
    count: int
    inside: bool
    options: tuple[Option, ...]


def build(
    rows: Iterable[SiteRow],
    prices: Mapping[str, Mapping[str, float]],
    levels: Callable[[SiteRow], list[Level]],
    fused: Sequence[frozenset[str]],
    treat_outside: bool,
    keep: Sequence[str] = (),
) -> list[Decision]:
    """The menu. prices: damage by site and level name; fused: roles that must share a level.

    Raises InputError for a `keep` pattern that matches no site.
    """
    rows = list(rows)
    kept = _kept([row.name for row in rows], keep)
    together: dict[tuple[object, ...], list[SiteRow]] = {}
    for row in rows:
        together.setdefault(_key(row, fused), []).append(row)
    return [_decision(group, prices, levels, treat_outside, kept) for group in together.values()]


def _kept(names: list[str], patterns: Sequence[str]) -> set[str]:
    kept: set[str] = set()
    for pattern in patterns:
        found = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.removesuffix(".weight"), pattern)}
        if not found:
            near = difflib.get_close_matches(pattern, names, 3, 0.3)
            raise InputError(f"--keep {pattern} matches nothing; near it: {', '.join(near) or ', '.join(names[:3])}")
        kept |= found
    return kept


def _key(row: SiteRow, fused: Sequence[frozenset[str]]) -> tuple[object, ...]:
    roles = next((r for r in fused if row.role in r), None)
    if roles is None or row.block is None:
        return (row.name,)
    parent = row.name.removesuffix(".weight").rpartition(".")[0]
    return (row.block, re.sub(r"\.experts\.\d+", ".experts", parent), tuple(sorted(roles)))


def _decision(
    group: list[SiteRow],
    prices: Mapping[str, Mapping[str, float]],
    levels: Callable[[SiteRow], list[Level]],
    treat_outside: bool,
    kept: set[str],
) -> Decision:
    inside = group[0].block is not None
    stored = Option(None, sum(r.stored_bytes for r in group), 0.0)
    options = [stored]
    if (inside or treat_outside) and not any(r.name in kept for r in group):
        common = set.intersection(*(set(levels(r)) for r in group))
        for level in sorted(common):
            if all(level.name in prices[r.name] for r in group):
                nbytes = sum(level.nbytes(*r.shape, r.scale_itemsize) for r in group)
                options.append(Option(level.name, nbytes, sum(prices[r.name][level.name] for r in group)))
    return Decision(group[0].name, tuple(r.name for r in group), sum(r.count for r in group), inside, _useful(options))


def _useful(options: list[Option]) -> tuple[Option, ...]:
    """Options by rising bytes, each with less damage than every smaller one."""
    useful: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.damage, str(o.level))):
        if not useful or option.damage < useful[-1].damage:
            useful.append(option)
    return tuple(useful)
