"""A menu as arrays, with pins on it: all that stays the same while the budget is dragged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from assay.budget import joint, offers
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, Option, SiteRow
from assay.budget.planners.lagrange import Prepared
from assay.budget.size import bits_allowed, bits_to_bytes
from assay.budget.table import Floats, Ints, Table
from assay.engines.contract import Contract
from assay.explore.state import KEEP, Pin
from assay.measure.profile import Profile
from assay.model.errors import InputError
from assay.model.level import Level
from assay.report.page.facts import OUTSIDE

POINTS = 60


@dataclass(frozen=True)
class Cells:
    """The map of a profile: one cell for the matrices of one role in one block.

    names: (block, role) by cell; rows: sites sorted by cell; cell: int64 [sites]; starts: int64 [cells], the first
    site of each; weights, before: int64 [cells], weights and stored bytes.
    """

    names: list[tuple[str, str]]
    rows: list[SiteRow]
    cell: Ints
    starts: Ints
    weights: Ints
    before: Ints

    @classmethod
    def of(cls, rows: Sequence[SiteRow]) -> Cells:
        """The cells of all sites; blocks in order, what lies outside them last."""
        found: dict[tuple[str, str], list[SiteRow]] = defaultdict(list)
        for row in rows:
            found[OUTSIDE if row.block is None else str(row.block), row.role].append(row)
        names = sorted(found, key=lambda n: (n[0] == OUTSIDE, int(n[0]) if n[0] != OUTSIDE else 0))
        sizes = np.array([len(found[n]) for n in names], dtype=np.int64)
        return cls(
            names, [row for n in names for row in found[n]], np.repeat(np.arange(len(names)), sizes), np.cumsum(sizes) - sizes,
            np.array([sum(r.count for r in found[n]) for n in names], dtype=np.int64),
            np.array([sum(r.stored_bytes for r in found[n]) for n in names], dtype=np.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class Menu:
    """What one engine and method allow. rest: bytes of tensors that nothing decides; owner: int64 [sites], the
    decision of each site of `cells`; nbytes: int64 [sites, levels of the table], of each site at each level; held: int64
    [decisions, options], bytes in the memory of the running engine."""

    contract: Contract
    method: str
    cells: Cells
    decisions: list[Decision]
    table: Table
    rest: int
    owner: Ints
    nbytes: Ints
    held: Ints

    @classmethod
    def of(cls, profile: Profile, cells: Cells, contract: Contract, method: str) -> Menu:
        """Raises InputError where nothing can be made smaller, or where there is nothing to mix."""
        check_mixes(contract)
        whole = _tensor_bytes(profile, contract)
        decisions = offers.decisions(profile, contract.narrowed()[0], method, False, ())
        table = Table.of(decisions)
        owners = {site: i for i, d in enumerate(decisions) for site in d.sites}
        owner = np.array([owners[row.name] for row in cells.rows], dtype=np.int64)
        rest = whole - sum(d.options[-1].nbytes for d in decisions)
        held = table.nbytes.copy()
        for i, taken in enumerate(joint.held_table(decisions, {row.name: row for row in cells.rows}, contract.name)):
            held[i, : len(taken)] = taken
        return cls(contract, method, cells, decisions, table, rest, owner, _site_bytes(cells.rows, table.levels), held)


@dataclass(frozen=True)
class Board:
    """A menu with pins. expected: float64 [decisions, options], damage that the forecast counts, nats per token;
    held: as of the menu; pinned: bool [decisions]; reach: least and most average bits in the blocks."""

    menu: Menu
    prepared: Prepared
    expected: Floats
    held: Ints
    pinned: np.ndarray
    reach: tuple[float, float]

    @classmethod
    def of(cls, menu: Menu, pins: Sequence[Pin], forecast: Forecast) -> Board:
        """Raises InputError for a pin that names nothing, or a level that its matrices can't have."""
        fixed = _fixed(menu, pins)
        table, decisions = _pinned(menu, fixed)
        held = menu.held.copy()
        held[list(fixed)] = menu.held[list(fixed), list(fixed.values())][:, None]
        counted = np.array([forecast.total([Option(name, 0, 1.0)]) for name in table.levels])
        pinned = np.zeros(len(decisions), dtype=bool)
        pinned[list(fixed)] = True
        inside, last = table.inside, table.count - 1
        weights = max(int(table.weights[inside].sum()), 1)
        least, most = (8 * int(table.nbytes[table.rows, c][inside].sum()) / weights for c in (np.zeros_like(last), last))
        return cls(menu, Prepared.of(decisions, table), table.damage * counted[table.level], held, pinned, (least, most))

    def choose(self, bits: float) -> Ints:
        """The planner's option of every decision, int64 [decisions]. Raises InputError."""
        return self.prepared.plan(self.limit(bits))

    def limit(self, bits: float) -> int:
        """Bytes that all decisions may take at an average of `bits` in the blocks. Raises InputError below the least."""
        table = self.prepared.table
        if bits < self.reach[0]:
            why = "these pins" if self.pinned.any() else "this model and engine"
            raise InputError(f"{bits:g} bits are out of reach; {why} allow {bits_allowed(*self.reach)}")
        most = table.nbytes[table.rows, table.count - 1]
        inside = min(bits_to_bytes(bits, int(table.weights[table.inside].sum())), int(most[table.inside].sum()))
        return inside + int(most[~table.inside].sum())

    def damage(self, choice: Ints) -> float:
        """What the forecast counts of a choice, nats per token."""
        return float(self.expected[self.prepared.table.rows, choice].sum())

    def nbytes(self, choice: Ints) -> int:
        """Bytes of all tensors of the result."""
        return self.menu.rest + self.prepared.table.bytes_of(choice)

    def held_bytes(self, choice: Ints) -> int:
        """The same in the memory of the running engine."""
        return self.menu.rest + int(self.held[self.prepared.table.rows, choice].sum())

    def bits(self, choice: Ints) -> float:
        """Average in the blocks."""
        table = self.prepared.table
        inside = table.inside
        return 8 * int(table.nbytes[table.rows, choice][inside].sum()) / max(int(table.weights[inside].sum()), 1)

    def frontier(self) -> list[Ints]:
        """Choices on the hulls, from the fewest bits to the most."""
        targets = np.linspace(*self.reach, POINTS)
        return [np.zeros_like(self.prepared.table.count), *(self.prepared.on_hull(self.limit(t)) for t in targets[1:].tolist())]


def check_mixes(contract: Contract) -> None:
    """Raises InputError for an engine that holds one level for the whole model."""
    if contract.one_level:
        raise InputError(f"{contract.name} holds one level for the whole model, so there is nothing to drag; "
                         f"assay plan --engine {contract.name} chooses it")  # fmt: skip


def _tensor_bytes(profile: Profile, contract: Contract) -> int:
    """Bytes of all tensors in the engine's layout if each stayed as it is. Raises InputError where there is no such file."""
    if contract.layout != "gguf":
        return sum(profile.index["names"].values())
    found = profile.index.get("gguf", {"refused": f"{profile.folder} says nothing about GGUF; run assay profile again"})
    if "refused" in found:
        raise InputError(found["refused"])
    return int(found["tensor_bytes"])


def _site_bytes(rows: Sequence[SiteRow], levels: Sequence[str | None]) -> Ints:
    """int64 [sites, levels]; zero where a level doesn't fit the shape, so that no decision offers it."""
    parsed = [None if name is None else Level.parse(name) for name in levels]
    known: dict[tuple[int, int, int], list[int]] = {}
    found = np.zeros((len(rows), len(levels)), dtype=np.int64)
    for i, row in enumerate(rows):
        key = (*row.shape, row.scale_itemsize)
        if key not in known:
            known[key] = [_level_bytes(level, *key) for level in parsed]
        found[i] = known[key]
    kept = [i for i, name in enumerate(levels) if name is None]
    found[:, kept] = np.array([[row.stored_bytes] for row in rows], dtype=np.int64)
    return found


def _level_bytes(level: Level | None, rows: int, columns: int, itemsize: int) -> int:
    if level is None or (level.group_size is not None and columns % level.group_size):
        return 0
    return level.nbytes(rows, columns, itemsize)


def _fixed(menu: Menu, pins: Sequence[Pin]) -> dict[int, int]:
    """Option by pinned decision; the last pin counts."""
    fixed: dict[int, int] = {}
    for pin in pins:
        cells = [i for i, name in enumerate(menu.cells.names) if name[0] != OUTSIDE and pin.matches(*name)]
        if not cells:
            raise InputError(f"a pin names block {pin.block}, {pin.role}, which this model lacks")
        owners = np.unique(menu.owner[np.isin(menu.cells.cell, cells)]).tolist()
        wanted = None if pin.level == KEEP else pin.level
        for i in owners:
            levels = [o.level for o in menu.decisions[i].options]
            if wanted not in levels:
                raise InputError(
                    f"{menu.decisions[i].name} can't have {pin.level}; choose {', '.join(x or KEEP for x in levels)}"
                )
            fixed[i] = levels.index(wanted)
    return fixed


def _pinned(menu: Menu, fixed: dict[int, int]) -> tuple[Table, list[Decision]]:
    """The menu where pinned decisions have one option."""
    if not fixed:
        return menu.table, menu.decisions
    table, decisions = menu.table, list(menu.decisions)
    rows, options = np.array(list(fixed)), np.array(list(fixed.values()))
    count = table.count.copy()
    count[rows] = 1
    changed = {name: getattr(table, name).copy() for name in ("nbytes", "damage", "level")}
    for name, values in changed.items():
        values[rows] = getattr(table, name)[rows, options][:, None]
    for i, option in fixed.items():
        decisions[i] = replace(decisions[i], options=(decisions[i].options[option],))
    return replace(table, count=count, **changed), decisions
