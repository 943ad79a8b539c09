"""From the state of a window to what it shows. Nothing here remembers a window: the page sends its whole state each time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from assay import engines
from assay.budget import agreement, joint, offers, plans, presets, serving
from assay.budget.caches import CacheChoice
from assay.budget.forecast import Forecast
from assay.budget.plan import Choice, Plan
from assay.budget.serving import Load
from assay.budget.size import Budget
from assay.budget.table import Floats, Ints
from assay.engines.serving import server
from assay.explore.board import Board, Cells, Menu, check_mixes
from assay.explore.state import KEEP, Pin, State
from assay.measure.footprint import Footprint
from assay.measure.profile import Profile
from assay.methods import base
from assay.model.errors import InputError

START_BITS = 4.25
START_CONTEXT = 8192
MENUS, BOARDS = 16, 64
MIXED = -1


class Session:
    """One profile and what was worked out of it."""

    def __init__(self, profile: Profile) -> None:
        """Raises InputError for a profile that can't be planned with."""
        self.profile = profile
        try:
            self.forecast = Forecast.from_index(profile.index)
            self.cells = Cells.of(offers.rows_of(profile))
            needs = profile.index.get("footprint")
            self.needs = None if needs is None else Footprint.from_json(needs)
            self.decoded = sum(profile.index["names"].values())
            self.origin = str(profile.index["model"]), str(profile.index["calibration"]["digest"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{profile.folder}: damaged profile ({error!r}); run assay profile again") from None
        self._menu = lru_cache(MENUS)(self._make_menu)
        self._board = lru_cache(BOARDS)(self._make_board)
        self._cache = lru_cache(BOARDS)(self._make_cache)

    def board(self, state: State) -> Board:
        """The menu of an engine and a method with pins on it. Raises InputError."""
        return self._board(engines.get(state.engine).name, presets.method(state.method, state.engine), state.pins)

    def _free(self, state: State) -> Board:
        """The same without pins: one level everywhere is one level everywhere."""
        return self.board(dataclasses.replace(state, pins=()))

    def _make_menu(self, engine: str, method: str) -> Menu:
        return Menu.of(self.profile, self.cells, engines.get(engine), method)

    def _make_board(self, engine: str, method: str, pins: tuple[Pin, ...]) -> Board:
        return Board.of(self._menu(engine, method), pins, self.forecast)

    def _make_cache(self, engine: str, context: int | None, batch: int, cache: str) -> CacheChoice | None:
        """The cache that a plan states, where the profile has its prices."""
        budget = Budget(**State(1.0, engine, context=context, batch=batch, cache=cache).budget)
        menu = joint.menu_of(self.profile, budget, engines.get(engine))
        return joint.choices(menu, budget)[0] if menu else None

    # ---- what the page shows -----------------------------------------------------------------

    def facts(self, engine: str, method: str) -> dict[str, Any]:
        """What no choice in the page changes, and the state it starts with. Raises InputError for unknown names."""
        context, engine = self._start_context(), engines.get(engine).name
        presets.method(method, engine)
        check_mixes(engines.get(engine))
        return {
            "profile": str(self.profile.folder), "family": str(self.profile.index["family"]),
            "model": str(self.profile.index.get("folder", "")), "start": {
                "bits": START_BITS, "engine": engine, "method": method, "context": context, "batch": 1,
                "cache": serving.DEFAULT_CACHE, "pins": [],
            },
            "engines": [n for n in engines.NAMES if not engines.get(n).one_level], "methods": ["auto", "best", *base.names()],
            "caches": {name: [c.name for c in server(name).caches] for name in engines.NAMES},
            "most_context": self.needs.context if self.needs else None,
            "cells": [list(name) for name in self.cells.names], "weights": self.cells.weights.tolist(),
            "before": self.cells.before.tolist(), "source_bytes": int(self.profile.index["file_bytes"]),
        }  # fmt: skip

    def _start_context(self) -> int | None:
        if self.needs is None or self.needs.unknown:
            return None
        return min(START_CONTEXT, self.needs.context or START_CONTEXT)

    def setting(self, state: State) -> dict[str, Any]:
        """What changes with engine, method and pins, but not with the budget. Raises InputError."""
        board = self.board(state)
        table, free = board.prepared.table, self._free(state)
        flats = free.prepared.flats
        single = {0: None} | {1 + 2 * i: name or KEEP for i, name in enumerate(table.levels)}
        return {
            "reach": board.reach, "levels": [name or KEEP for name in table.levels],
            "method": board.menu.method, "pinned": self._pinned_cells(board).tolist(),
            "frontier": [self._figures(board, choice) for choice in board.frontier()],
            "uniform": [self._figures(free, flats.choices[i]) | {"level": name} for i, name in single.items() if name],
        }  # fmt: skip

    def answer(self, state: State) -> dict[str, Any]:
        """The plan of a state. Raises InputError with the achievable range."""
        board = self.board(state)
        choice, free = board.choose(state.bits), self._free(state)
        table, flat = free.prepared.table, free.prepared.flats.best(free.limit(state.bits))
        inside = np.bincount(table.level[table.rows, flat][table.inside], minlength=len(table.levels))
        uniform = self._figures(free, flat) | {"level": table.levels[int(inside.argmax())] or KEEP}
        return self._figures(board, choice) | {
            "uniform": uniform, "serving": self._serving(state, board.held_bytes(choice)), "cells": self._columns(board, choice),
        }  # fmt: skip

    def cell(self, state: State, block: str, role: str) -> dict[str, Any]:
        """One cell of the map: levels of its matrices, and what each level that all may have would cost. Raises InputError."""
        board = self.board(state)
        if (block, role) not in self.cells.names:
            raise InputError(f"block {block}, {role}: this model has no such matrices")
        index = self.cells.names.index((block, role))
        sites, menu = np.flatnonzero(self.cells.cell == index), board.menu
        owners = np.unique(menu.owner[sites]).tolist()
        choice, table = board.choose(state.bits), board.prepared.table
        used = Counter(table.levels[table.level[i, choice[i]]] or KEEP for i in menu.owner[sites].tolist())
        together = {row.role for row, i in zip(self.cells.rows, menu.owner.tolist(), strict=True) if i in set(owners)}
        options = [{o.level or KEEP: o for o in menu.decisions[i].options} for i in owners]
        common = [name for name in options[0] if all(name in o for o in options)]
        return {
            "block": block, "role": role, "sites": [self.cells.rows[i].name for i in sites.tolist()],
            "levels": dict(used), "together": sorted(together), "pinned": bool(board.pinned[owners].any()),
            "options": [
                {"level": name, "nbytes": sum(o[name].nbytes for o in options), "damage": sum(o[name].damage for o in options)}
                for name in common
            ],
        }  # fmt: skip

    def compare(self, path: str | Path) -> dict[str, Any]:
        """A plan from a file, its figures computed anew, in the form of `answer`. Raises InputError."""
        plan = Plan.load(path)
        plan = plans.checked(self.profile, plan, engines.get(plan.engine))
        chosen = [plan.choices[row.name] for row in self.cells.rows]
        names = list(dict.fromkeys(c.level or KEEP for c in chosen))
        level = np.array([names.index(c.level or KEEP) for c in chosen])
        nbytes, damage = np.array([c.nbytes for c in chosen]), np.array([c.damage for c in chosen])
        return {
            "path": str(path), "engine": plan.engine, "method": plan.method, "bits": plan.bits, "nbytes": plan.nbytes_tensors,
            "predicted": plan.predicted, "low": plan.predicted_low, "high": plan.predicted_high, "levels": names,
            "serving": dict(plan.serving) or None, "cells": self._cells(level, nbytes, damage),
        }  # fmt: skip

    # ---- plans -------------------------------------------------------------------------------

    def plan(self, state: State) -> Plan:
        """The plan of a state as `assay plan` would make it. Raises InputError."""
        board = self.board(state)
        choice, table = board.choose(state.bits), board.prepared.table
        levels = [table.levels[i] for i in table.level[table.rows, choice].tolist()]
        sites = {site: level for d, level in zip(board.prepared.decisions, levels, strict=True) for site in d.sites}
        bare = Plan(
            *self.origin, board.menu.contract.name, board.menu.method, state.budget,
            {name: Choice(level, 0, 0.0, "") for name, level in sites.items()}, 0, 0.0, 0.0, 0.0, 0.0, 0.0, {}, 0.0, "",
        )  # fmt: skip
        cache = self._cache(board.menu.contract.name, state.context, state.batch, state.cache)
        bare = joint.with_cache(bare, cache) if cache else bare
        made = plans.checked(self.profile, bare, board.menu.contract)
        held = {s for d, is_pinned in zip(board.prepared.decisions, board.pinned, strict=True) if is_pinned for s in d.sites}
        choices = {n: dataclasses.replace(c, why="pinned by hand") if n in held else c for n, c in made.choices.items()}
        return agreement.noted(self.profile, dataclasses.replace(made, choices=choices))

    def save(self, state: State, path: str) -> Path:
        """Write the plan of a state to a new file. Raises InputError."""
        target = new_file(path)
        self.plan(state).save(target)
        return target

    # ---- figures -----------------------------------------------------------------------------

    def _figures(self, board: Board, choice: Ints) -> dict[str, Any]:
        low, expected, high = self.forecast.kl(board.menu.method, board.damage(choice))
        return {"bits": board.bits(choice), "nbytes": board.nbytes(choice), "predicted": expected, "low": low, "high": high}

    def _serving(self, state: State, weights: int) -> dict[str, Any] | None:
        """Memory of the served model; why it isn't known; None where no context was given."""
        if state.context is None:
            return None
        try:
            needs, load = Footprint.from_json(self.profile.index.get("footprint")), Load(state.context, state.batch, state.cache)
            engine = engines.get(state.engine).name
            cache = self._cache(engine, state.context, state.batch, state.cache)
            return serving.summary(needs, load, engine, weights, self.decoded, cache)
        except InputError as error:
            return {"error": str(error)}

    def _columns(self, board: Board, choice: Ints) -> Mapping[str, Any]:
        menu, table = board.menu, board.prepared.table
        level = table.level[table.rows, choice][menu.owner]
        nbytes = menu.nbytes[np.arange(len(level)), level]
        shared = np.bincount(menu.owner, minlength=len(table.count))
        return self._cells(level, nbytes, (table.damage[table.rows, choice] / np.maximum(shared, 1))[menu.owner])

    def _cells(self, level: Ints, nbytes: Ints, damage: Floats) -> dict[str, Any]:
        """By cell, from columns by site: level (an index, `MIXED` where they differ), bytes, damage in nats per token."""
        starts = self.cells.starts
        least, most = np.minimum.reduceat(level, starts), np.maximum.reduceat(level, starts)
        return {
            "level": np.where(least == most, least, MIXED).tolist(), "nbytes": np.add.reduceat(nbytes, starts).tolist(),
            "damage": np.add.reduceat(damage, starts).tolist(),
        }  # fmt: skip

    def _pinned_cells(self, board: Board) -> Ints:
        return np.unique(self.cells.cell[board.pinned[board.menu.owner]])


def new_file(path: str) -> Path:
    """Where a plan may be written. Raises InputError for what exists or can't be."""
    if not path.strip() or "\0" in path:
        raise InputError("name a file for the plan, like plan.yaml")
    target = Path(path.strip()).expanduser()
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists; choose another name or remove it")
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target.absolute().parent} does not exist; make it first")
    return target
