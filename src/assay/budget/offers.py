"""What every site of a model may become: its sites, what an engine's contract refuses, and the menu that is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from assay.budget import menu
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, SiteRow
from assay.budget.size import Budget
from assay.engines.contract import Contract
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel, read_weight
from assay.methods import base, menus
from assay.methods.grid.integer import IntegerGrid
from assay.model.errors import InputError
from assay.model.ggml import KINDS
from assay.model.level import Level
from assay.model.sites import Site, has_experts

SAMPLED_ROWS = 64
P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def preferring(planned: Callable[Concatenate[S, Budget, Contract, P], R]) -> Callable[Concatenate[S, Budget, Contract, P], R]:
    """A function that plans, tried with what the contract prefers before all that it holds; for a named level with that only."""

    @wraps(planned)
    def tried(source: S, budget: Budget, contract: Contract, /, *given: P.args, **named: P.kwargs) -> R:
        for narrow in () if budget.level else contract.narrowed()[:-1]:
            with suppress(InputError):
                return planned(source, budget, narrow, *given, **named)
        return planned(source, budget, contract, *given, **named)

    return tried


def rows(model: StreamedModel, nbytes: Callable[[str], int]) -> list[SiteRow]:
    """What the planner needs to know of every site. nbytes: of a stored tensor."""
    return [
        SiteRow(
            site.name, site.role, site.block, site.shape, nbytes(site.name),
            min(model.checkpoint.dtype(site.name).itemsize, 4), site.transposed, site.expert,
        ) for site in model.anatomy.sites.values()
    ]  # fmt: skip


def rows_of(profile: Profile) -> list[SiteRow]:
    """The sites of a profile."""
    return [SiteRow(**(r | {"shape": tuple(r["shape"])})) for r in profile.index["rows"]]


def refused(contract: Contract, row: SiteRow | Site) -> str | None:
    """Why an engine keeps a site as it is."""
    return contract.refuses(row.role, row.shape, row.transposed, row.expert, row.name)


def decisions(
    profile: Profile, contract: Contract, method: str, outside: bool, keep: Sequence[str], only: Level | None = None,
    named: Mapping[str, Level] | None = None,
) -> list[Decision]:  # fmt: skip
    """The menu of one profile under one engine's rules, priced for one method; only: the one level to offer; named: levels
    that a plan has, by site, where other ones than that take back the limit to one level.

    Raises InputError when it has no choice.
    """
    forecast, kind = Forecast.from_index(profile.index), base.get(method).prices

    def price(row: SiteRow, level: Level) -> float | None:
        known, wanted = profile.prices.get(row.name, {}).get(level.base.name), _price_kind(row, kind)
        return forecast.damage(method, level, known[wanted], row.block) if known and wanted in known else None

    found = rows_of(profile)
    experts = has_experts((row.expert for row in found), profile.index["kept"])
    refusal = contract.refusal(str(profile.index["family"]), experts)
    return priced(found, refusal, contract, method, outside, keep, only, price, named)


def menus_of(
    profile: Profile, contract: Contract, method: str, outside: bool, keep: Sequence[str], only: Level | None = None
) -> list[list[Decision]]:
    """Menus of which a plan takes one: `decisions`, or one a level where the engine holds one level for the whole model.

    Raises InputError when none has a choice.
    """
    if only or not contract.one_level:
        return [decisions(profile, contract, method, outside, keep, only)]
    columns = {row.shape[1] for row in rows_of(profile)}
    levels = {x for c in columns for x in base.get(method)().levels(c) if contract.takes(x, c)}
    found, problems = [], [InputError(f"{contract.name} can't hold what {method} makes; --engine assay can")]
    for level in sorted(levels):
        try:
            found.append(decisions(profile, contract, method, outside, keep, level))
        except InputError as error:
            problems.append(error)
    if not found:
        raise problems[-1]
    return found


def ladder(profile: Profile, contract: Contract, method: str, outside: bool, keep: Sequence[str]) -> list[list[list[Decision]]]:
    """`menus_of` what the contract prefers, in its order, and at last of all that it holds; a budget takes the first it fits."""
    found = []
    for narrow in contract.narrowed()[:-1]:
        with suppress(InputError):
            found.append(menus_of(profile, narrow, method, outside, keep))
    return [*found, menus_of(profile, contract, method, outside, keep)]


def only_level(budget: Budget) -> Level | None:
    """The one level that a budget names, if it does."""
    return Level.parse(budget.level) if budget.level else None


def priced(
    found: Sequence[SiteRow], refusal: str | None, contract: Contract, method: str, outside: bool, keep: Sequence[str],
    only: Level | None, price: Callable[[SiteRow, Level], float | None], named: Mapping[str, Level] | None = None,
) -> list[Decision]:  # fmt: skip
    """`decisions` of sites whose damage at a level `price` tells, None where it is not known; refusal: why all stays."""
    kinds = base.get(method)().levels
    reasons = {row.name: refusal or refused(contract, row) for row in found}
    asked = {row.name: row for row in found if outside or row.block is not None}
    if only and not named and contract.takes(only, math.lcm(only.group_size or 1, 32)):
        stays = menu.matching([row.name for row in found], keep)
        free = [row for name, row in asked.items() if name not in stays and not reasons[name]]
        check_groups(only, free, "; or leave it out by --keep")
    own = {row.name: _stand_in(contract, only, row.shape[1]) for row in found} if only else {}
    edited = any(own.get(name, level) != level for name, level in (named or {}).items())
    offered: dict[str, list[Level]] = {}
    prices: dict[str, dict[str, float]] = {}
    for row in found:
        columns = row.shape[1]
        levels = [own[row.name]] if only else []
        levels = [] if reasons[row.name] else [*levels, *kinds(columns)] if edited or not only else levels
        offered[row.name] = [x for x in levels if contract.takes(x, columns, row.expert is not None, row.shape[0])]
        prices[row.name] = {x.name: p for x in offered[row.name] if (p := price(row, x)) is not None}
    options = menu.build(found, prices, lambda row: [x for x in offered[row.name] if x.name in prices[row.name]],
                         contract.fused, outside, keep, contract.experts_by_role, contract.nbytes, named)  # fmt: skip
    if any(len(d.options) > 1 for d in options):
        return options
    if any(prices[name] for name in asked):
        why = "--keep matches all that could be; loosen it" if keep else "no level takes fewer bytes"
    elif any(offered[name] for name in asked):
        wanted = f"--level {only.name}" if only else f"--method {method}"
        why = f"the profile has no prices for that; run assay profile again with {wanted}"
    elif all(reasons[name] for name in asked):
        why = f"{'; '.join(sorted({str(reasons[name]) for name in asked}))}; --engine plain simulates it"
    else:
        example = (only or kinds(64)[0]).name
        why = f"{contract.name} can't hold what {method} makes ({example} and the like); --engine assay can"
    raise InputError(f"nothing can be made smaller: {why}")


def check_groups(level: Level, rows: Sequence[SiteRow | Site], advice: str = "") -> None:
    """Raises InputError where a level's groups don't divide a row of some matrix; blocks of llama.cpp have stand-ins."""
    for row in () if level.format in KINDS else rows:
        try:
            level.groups(row.shape[1])
        except InputError as error:
            raise InputError(f"{level.name}: {row.name}: {error}{advice}") from error


def _stand_in(contract: Contract, level: Level, columns: int) -> Level:
    """What takes a level's place in rows that it does not divide, of what the engine has."""
    usual = menus.stand_in(level, columns)
    finer = sorted(x for x in menus.blocks(columns) if x.bits >= level.bits and contract.takes(x, columns))
    return usual if usual == level or contract.takes(usual, columns) or not finer else finer[0]


def _price_kind(row: SiteRow, kind: str) -> str:
    """Rows of an embedding or a head are not error-fed through each other."""
    return "gptq" if row.block is None and kind == "two_sided" else kind


def roughly(model: StreamedModel) -> Callable[[SiteRow, Level], float]:
    """What a level does to a matrix before anything is measured: its squared error on some rows of one as wide, for each weight.

    It only puts levels in order. Those that aren't integers go by their bits.
    """
    sites = {site.shape[1]: site for site in reversed(model.anatomy.sites.values())}
    samples: dict[int, Tensor] = {}
    known: dict[tuple[Level, int], float] = {}

    def error(level: Level, columns: int) -> float:
        if level.format != "int" or level != level.base:
            return 4.0**-level.bits
        if columns not in samples:
            samples[columns] = read_weight(model, sites[columns])[:SAMPLED_ROWS]
        wide = samples[columns]
        grid = IntegerGrid(int(level.bits), level.group_size, level.symmetric)
        affine = grid.fit(wide)
        return float((grid.decode(grid.encode(wide, affine), affine) - wide).square().sum() / wide.square().sum())

    def worth(row: SiteRow, level: Level) -> float:
        key = (level, row.shape[1])
        if key not in known:
            known[key] = error(*key)
        return row.count * known[key]

    return worth
