"""Plans from profiles: menus within an engine's contract, a budget, and a promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from assay.budget import menu, planners
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, SiteRow
from assay.budget.plan import Choice, Plan, validate
from assay.budget.planners import lagrange
from assay.budget.size import Budget
from assay.engines.contract import Contract
from assay.engines.layout import check_alike
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.methods import base
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.sites import Site, key_of


def rows(model: StreamedModel, nbytes: Callable[[str], int]) -> list[SiteRow]:
    """What the planner needs to know of every site. nbytes: of a stored tensor; the sites in one share it to the byte."""
    held: dict[str, list[Site]] = {}
    for site in model.anatomy.sites.values():
        held.setdefault(site.name, []).append(site)
    found = []
    for name, sites in held.items():
        itemsize, total = min(model.checkpoint.dtype(name).itemsize, 4), nbytes(name)
        ends = [total * i // len(sites) for i in range(len(sites) + 1)]
        for site, start, end in zip(sites, ends, ends[1:], strict=False):
            found.append(SiteRow(
                key_of(site), site.role, site.block, site.shape, end - start, itemsize,
                site.transposed, site.expert, site.stacked,
            ))  # fmt: skip
    return found


def refused(contract: Contract, row: SiteRow | Site) -> str | None:
    """Why an engine keeps a site as it is."""
    if row.stacked:
        return "experts stored as one 3-D tensor"
    return contract.refuses(row.role, row.shape, row.transposed, row.expert, row.name)


def decisions(
    profile: Profile, contract: Contract, method: str, outside: bool, keep: Sequence[str], only: Level | None = None
) -> list[Decision]:
    """The menu of one profile under one engine's rules, priced for one method; only: the one level to offer.

    Raises InputError when it has no choice.
    """
    forecast, kind = Forecast.from_index(profile.index), base.get(method).prices

    def price(row: SiteRow, level: Level) -> float | None:
        priced = profile.prices.get(row.name, {}).get(level.base.name)
        return forecast.damage(method, level, priced[_price_kind(row, kind)]) if priced else None

    return _menu(_rows(profile), str(profile.index["family"]), contract, method, outside, keep, only, price)


def outlook(model: StreamedModel, budget: Budget, contract: Contract, method: str, keep: Sequence[str]) -> int:
    """Bytes that the weight files may take within a budget, told before anything is measured.

    For a bound on the loss the fewest that are possible. Raises InputError for what no measurement can make possible.
    """
    found, only = rows(model, model.checkpoint.kept_nbytes), _only(budget)
    outside = budget.size is not None
    options = _menu(found, model.anatomy.family, contract, method, outside, keep, only, lambda row, level: 0.0)
    fixed = _fixed_bytes(model.checkpoint.kept_file_bytes, options)
    if budget.max_loss is not None or only:
        return fixed + sum(d.options[0].nbytes for d in options)
    return fixed + min(budget.limit_for(options, fixed), sum(d.options[-1].nbytes for d in options))


def _only(budget: Budget) -> Level | None:
    return Level.parse(budget.level) if budget.level else None


def _menu(
    found: Sequence[SiteRow], family: str, contract: Contract, method: str, outside: bool, keep: Sequence[str],
    only: Level | None, price: Callable[[SiteRow, Level], float | None],
) -> list[Decision]:  # fmt: skip
    whole, kinds = contract.refusal(family, any(row.expert is not None for row in found)), base.get(method)().levels
    reasons = {row.name: whole or refused(contract, row) for row in found}
    offered: dict[str, list[Level]] = {}
    prices: dict[str, dict[str, float]] = {}
    for row in found:
        columns = row.shape[1]
        levels = [] if reasons[row.name] else [only] if only else kinds(columns)
        offered[row.name] = [x for x in levels if contract.takes(x, columns, row.expert is not None)]
        prices[row.name] = {x.name: p for x in offered[row.name] if (p := price(row, x)) is not None}
    options = menu.build(found, prices, lambda row: [x for x in offered[row.name] if x.name in prices[row.name]],
                         contract.fused, outside, keep, contract.nbytes)  # fmt: skip
    if any(len(d.options) > 1 for d in options):
        return options
    asked = [row.name for row in found if outside or row.block is not None]
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


def _rows(profile: Profile) -> list[SiteRow]:
    return [SiteRow(**(r | {"shape": tuple(r["shape"])})) for r in profile.index["rows"]]


def _price_kind(row: SiteRow, kind: str) -> str:
    """Rows of an embedding or a head are not error-fed through each other."""
    return "gptq" if row.block is None and kind == "two_sided" else kind


def make(
    profile: Profile, budget: Budget, contract: Contract, method: str, keep: Sequence[str], planner: str, uniform: bool
) -> Plan:
    """The plan for a budget. Raises InputError with the achievable range when there is none."""
    if contract.one_level and budget.level is None:
        return _best_single(profile, budget, contract, method, keep, planner, uniform)
    return _make(profile, budget, contract, method, keep, planner, uniform, _only(budget))


def _best_single(
    profile: Profile, budget: Budget, contract: Contract, method: str, keep: Sequence[str], planner: str, uniform: bool
) -> Plan:
    """The best plan that gives every site one and the same level or keeps it. Raises InputError when none fits."""
    columns = {row.shape[1] for row in _rows(profile)}
    levels = {x for c in columns for x in base.get(method)().levels(c) if contract.takes(x, c)}
    found, problems = [], []
    for level in sorted(levels):
        try:
            found.append(_make(profile, budget, contract, method, keep, planner, uniform, level))
        except InputError as error:
            problems.append(error)
    if found:
        return min(found, key=lambda p: (p.predicted, p.nbytes_tensors)[:: 1 if budget.max_loss is None else -1])
    raise problems[0] if problems else InputError(f"{contract.name} can't hold what {method} makes; --engine assay can")


def _make(
    profile: Profile, budget: Budget, contract: Contract, method: str, keep: Sequence[str], planner: str, uniform: bool,
    only: Level | None,
) -> Plan:  # fmt: skip
    options = decisions(profile, contract, method, budget.size is not None, keep, only)
    forecast = Forecast.from_index(profile.index)
    if budget.max_loss is not None:
        choice = lagrange.plan_for_loss(options, forecast.damage_for(method, budget.max_loss))
        limit = sum(d.options[c].nbytes for d, c in zip(options, choice, strict=True))
    elif budget.level:
        choice = [0 if d.inside else len(d.options) - 1 for d in options]
        limit = sum(d.options[c].nbytes for d, c in zip(options, choice, strict=True))
    else:
        limit = budget.limit_for(options, _fixed_bytes(int(profile.index["file_bytes"]), options))
        choice = planners.get("uniform" if uniform else planner).plan(options, limit)
    return _assemble(profile, budget, contract, method, options, choice, limit)


def _fixed_bytes(file_bytes: int, options: Sequence[Decision]) -> int:
    """File bytes that no decision changes: kept tensors, headers, and room for the longer headers to come."""
    decided = sum(d.options[-1].nbytes for d in options)
    names = sum(len(site) for d in options for site in d.sites)
    return file_bytes - decided + HEADER_PER_SITE * sum(len(d.sites) for d in options) + 4 * names


HEADER_PER_SITE = 420


def _assemble(
    profile: Profile, budget: Budget, contract: Contract, method: str, options: list[Decision],
    choice: list[int], limit: int,
) -> Plan:  # fmt: skip
    plain, bound = planners.get("uniform").plan(options, limit), lagrange.lower_bound(options, limit)
    forecast = Forecast.from_index(profile.index)
    damage, nbytes = _totals(options, choice)
    low, expected, high = forecast.kl(method, damage)
    plain_damage, plain_bytes = _totals(options, plain)
    fixed = sum(profile.index["names"].values()) - sum(d.options[-1].nbytes for d in options)
    tensors = fixed + nbytes
    own = {row.name: row for row in _rows(profile)}
    choices = {}
    for d, c in zip(options, choice, strict=True):
        option = d.options[c]
        why = _why(d, c)
        for site in d.sites:
            choices[site] = Choice(option.level, _nbytes(contract, own[site], option.level), option.damage / len(d.sites), why)
    uniform = {
        "level": _common(options, plain), "nbytes": fixed + plain_bytes, "bits": _bits(options, plain),
        "predicted": forecast.kl(method, plain_damage)[1],
    }  # fmt: skip
    return Plan(
        model=profile.index["model"], profile=profile.index["calibration"]["digest"], engine=contract.name, method=method,
        budget={k: v for k, v in dataclasses.asdict(budget).items() if v is not None}, choices=choices,
        nbytes_tensors=tensors, bits=_bits(options, choice), bits_all=8 * tensors / int(profile.index["parameters"]),
        predicted=expected, predicted_low=low, predicted_high=high, uniform=uniform,
        gap=max(0.0, damage - bound) / bound if bound > 0 else 0.0, sentence=_sentence(expected, low, high, uniform),
    )  # fmt: skip


def _nbytes(contract: Contract, row: SiteRow, level: str | None) -> int:
    return row.stored_bytes if level is None else contract.nbytes(Level.parse(level), *row.shape, row.scale_itemsize)


def _totals(options: Sequence[Decision], choice: Sequence[int]) -> tuple[float, int]:
    picked = [d.options[c] for d, c in zip(options, choice, strict=True)]
    return sum(o.damage for o in picked), sum(o.nbytes for o in picked)


def _bits(options: Sequence[Decision], choice: Sequence[int]) -> float:
    inside = [(d.options[c].nbytes, d.count) for d, c in zip(options, choice, strict=True) if d.inside]
    return 8 * sum(b for b, _ in inside) / max(1, sum(n for _, n in inside))


def _common(options: Sequence[Decision], choice: Sequence[int]) -> str | None:
    levels = [d.options[c].level for d, c in zip(options, choice, strict=True) if d.inside]
    return max(set(levels), key=lambda x: (levels.count(x), str(x))) if levels else None


def _why(decision: Decision, index: int) -> str:
    option = decision.options[index]
    if option.level is None:
        return "kept: no smaller choice was worth its loss" if len(decision.options) > 1 else "kept: no level allowed"
    if index == 0:
        return "smallest choice"
    smaller = decision.options[index - 1]
    saved, cost = option.nbytes - smaller.nbytes, smaller.damage - option.damage
    return f"{smaller.level} would save {saved} bytes for {cost:.2g} nats more"


def _sentence(expected: float, low: float, high: float, uniform: Mapping[str, Any]) -> str:
    text = f"predicted KL {expected:.4f} nats/token ({low:.4f} to {high:.4f})"
    other = uniform["predicted"]
    if 0.9 * other < expected < other / 0.9:
        return f"{text}; not distinguishable from uniform {uniform['level']} ({other:.4f})"
    return f"{text}; uniform {uniform['level']} in the same budget: {other:.4f}"


def checked(profile: Profile, plan: Plan, contract: Contract) -> Plan:
    """A plan from a file, its origin, sites and levels checked and its figures computed anew. Raises InputError.

    What is uniform in its sentence is the best single level in its budget, or in its bytes where an edit needs more.
    """
    check_origin(plan, profile.index["model"], profile.index["calibration"]["digest"])
    known = {row.name: row for row in _rows(profile)}
    for name, chosen in plan.choices.items():
        if name in known and chosen.level:
            _check_group_size(known[name], chosen.level)
    if contract.one_level:
        check_alike({n: Level.parse(c.level) for n, c in plan.choices.items() if c.level}, contract.name)
    budget = Budget(**plan.budget)
    outside = budget.size is not None or any(c.level for n, c in plan.choices.items() if n in known and known[n].block is None)
    options = decisions(profile, contract, plan.method, outside, (), _only(budget))
    validate(plan, options)
    choice = [[o.level for o in d.options].index(plan.choices[d.sites[0]].level) for d in options]
    limit = _totals(options, choice)[1]
    if budget.size is not None or budget.bits is not None:
        limit = max(limit, budget.limit_for(options, _fixed_bytes(int(profile.index["file_bytes"]), options)))
    return _assemble(profile, budget, contract, plan.method, options, choice, limit)


def check_origin(plan: Plan, model: str, text: str | None) -> None:
    """Refuse a plan of another model or profile. model: fingerprint; text: digest, None where not known yet."""
    if plan.model != model:
        raise InputError("the plan was made for another model; run assay plan on a profile of this one")
    if text is not None and plan.profile != text:
        raise InputError("the plan was made from another profile; give that one with --profile, or run assay plan on this one")


def _check_group_size(row: SiteRow, level: str) -> None:
    try:
        Level.parse(level).groups(row.shape[1])
    except InputError as error:
        raise InputError(f"{row.name}: {error}") from None


def uniform_twin(profile: Profile, plan: Plan, contract: Contract, keep: Sequence[str]) -> Plan | None:
    """The best uniform plan of the same budget, or None where there is none or it is the same plan."""
    budget = Budget(**plan.budget)
    if budget.max_loss is not None or budget.level is not None:
        return None
    twin = make(profile, budget, contract, plan.method, keep, "uniform", True)
    same = all(twin.choices[n].level == c.level for n, c in plan.choices.items())
    return None if same else twin


def corrected(profile: Profile, plan: Plan, twin: Plan, measured: float) -> Plan:
    """The plan with its promise corrected by its uniform twin's measured KL (nats per token)."""
    forecast = Forecast.from_index(profile.index)
    low, expected, high = forecast.corrected(plan.predicted, twin.predicted, measured)
    uniform = dict(plan.uniform) | {"measured": measured}
    sentence = _sentence(expected, low, high, uniform | {"predicted": measured})
    return dataclasses.replace(
        plan, predicted=expected, predicted_low=low, predicted_high=high, uniform=uniform, sentence=sentence
    )


def polished(plan: Plan, polish: Mapping[str, Any]) -> Plan:
    """The plan with its promise scaled as tuning the whole model changed the KL on held-out text.

    polish: `before` and `after` in nats per token, and whether the tuned model is `used`.
    """
    before, after = polish["before"], polish["after"]
    if not polish["used"]:
        return dataclasses.replace(plan, sentence=f"{plan.sentence}; polishing didn't lower {before:.4f} on held-out text")
    ratio = after / before
    return dataclasses.replace(
        plan, predicted=ratio * plan.predicted, predicted_low=ratio * plan.predicted_low,
        predicted_high=ratio * plan.predicted_high,
        sentence=f"{plan.sentence}; polished on held-out text from {before:.4f} to {after:.4f}",
    )  # fmt: skip
