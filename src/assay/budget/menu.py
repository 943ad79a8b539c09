"""Menus: for every decision the options worth having, each with its bytes and its damage."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from assay.model.errors import InputError
from assay.model.level import Level

Nbytes = Callable[[Level, int, int, int], int]
"""Exact bytes of a weight at a level, from its rows, columns and bytes a scale."""


@dataclass(frozen=True)
class SiteRow:
    """What planning needs to know of a site. stored_bytes: when it is kept; scale_itemsize: of a scale."""

    name: str
    role: str
    block: int | None
    shape: tuple[int, int]
    stored_bytes: int
    scale_itemsize: int
    transposed: bool = False
    expert: int | None = None

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
    """Sites decided together. count: weights; inside: within the blocks; options: by rising bytes.

    The last option always keeps the sites as they are stored, with no damage. Each loses less than the smaller ones, but for
    one that a plan names.
    """

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
    experts_by_role: bool = False,
    nbytes: Nbytes = Level.nbytes,
    named: Mapping[str, Level] | None = None,
) -> list[Decision]:
    """The menu. prices: damage by site and level name; fused: roles that must share a level; experts_by_role: whether
    the experts of a layer share one for each role; nbytes: see `Nbytes`; named: levels by site that somebody chose.

    A level is left out where it has no finite price at one of the sites decided together, or doesn't make them smaller, or
    where a smaller one loses less and nobody named it. Raises InputError for a `keep` pattern that matches no site.
    """
    rows = list(rows)
    kept = matching([row.name for row in rows], keep)
    found = together(rows, fused, experts_by_role)
    chosen = {site: level.name for site, level in (named or {}).items()}
    return [_decision(group, prices, levels, treat_outside, kept, nbytes, chosen) for group in found]


def together(rows: Iterable[SiteRow], fused: Sequence[frozenset[str]], experts_by_role: bool = False) -> list[list[SiteRow]]:
    """Sites that are decided together. fused, experts_by_role: see `build`."""
    found: dict[tuple[object, ...], list[SiteRow]] = {}
    for row in rows:
        found.setdefault(_key(row, fused, experts_by_role), []).append(row)
    return list(found.values())


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The names that some pattern of `--keep` matches. Raises InputError for a pattern that matches none."""
    kept: set[str] = set()
    for pattern in patterns:
        found = {n for n in names if any(fnmatchcase(x, pattern) for x in (n, n.removesuffix(".weight")))}
        if not found:
            near = difflib.get_close_matches(pattern, names, 3, 0.3)
            raise InputError(f"--keep {pattern} matches nothing; near it: {', '.join(near or names[:3])}")
        kept |= found
    return kept


def _key(row: SiteRow, fused: Sequence[frozenset[str]], experts_by_role: bool) -> tuple[object, ...]:
    if experts_by_role and row.expert is not None:
        return (row.block, "experts", row.role)
    if fused and row.expert is not None:
        return (row.block, "experts")
    roles = next((r for r in fused if row.role in r), None)
    if roles is None or row.block is None:
        return (row.name,)
    parent = row.name.removesuffix(".weight").rpartition(".")[0]
    return (row.block, parent, tuple(sorted(roles)))


def _decision(
    group: list[SiteRow],
    prices: Mapping[str, Mapping[str, float]],
    levels: Callable[[SiteRow], list[Level]],
    treat_outside: bool,
    kept: set[str],
    nbytes: Nbytes,
    named: Mapping[str, str],
) -> Decision:
    inside = group[0].block is not None
    stored = Option(None, sum(r.stored_bytes for r in group), 0.0)
    options: list[Option] = []
    if (inside or treat_outside) and not any(r.name in kept for r in group):
        common = set.intersection(*(set(levels(r)) for r in group))
        options = [_option(group, prices, level, nbytes) for level in sorted(common)]
    smaller = [o for o in options if o.nbytes < stored.nbytes and math.isfinite(o.damage)]
    own, useful = {named.get(r.name) for r in group}, _useful(smaller)
    offered = sorted({*useful, *(o for o in smaller if o.level in own)}, key=lambda o: (o.nbytes, o.damage))
    return Decision(group[0].name, tuple(r.name for r in group), sum(r.count for r in group), inside, (*offered, stored))


def _option(group: list[SiteRow], prices: Mapping[str, Mapping[str, float]], level: Level, nbytes: Nbytes) -> Option:
    total = sum(nbytes(level, *r.shape, r.scale_itemsize) for r in group)
    return Option(level.name, total, sum(prices.get(r.name, {}).get(level.name, math.inf) for r in group))


def _useful(options: Iterable[Option]) -> list[Option]:
    """Options by rising bytes, each with less damage than every smaller one."""
    useful: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.damage, str(o.level))):
        if not useful or option.damage < useful[-1].damage:
            useful.append(option)
    return useful
