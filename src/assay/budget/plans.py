"""Plans from profiles: menus within an engine's contract, a budget, and a promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from assay.budget import menu, planners
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, SiteRow
from assay.budget.plan import Choice, Plan, validate
from assay.budget.planners import lagrange
from assay.budget.size import Budget
from assay.engines.contract import Contract
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.methods import base
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.sites import Site, key_of


def rows(model: StreamedModel) -> list[SiteRow]:
    """What the planner needs to know of every site."""
    found = []
    for site in model.anatomy.sites.values():
        itemsize = min(model.checkpoint.dtype(site.name).itemsize, 4)
        share = site.count * itemsize if site.stacked else model.checkpoint.nbytes(site.name)
        found.append(SiteRow(
            key_of(site), site.role, site.block, site.shape, share, itemsize,
            site.transposed, site.expert, site.stacked,
        ))  # fmt: skip
    return found


def refused(contract: Contract, row: SiteRow | Site) -> str | None:
    """Why an engine keeps a site as it is."""
    if row.stacked:
        return "experts stored as one 3-D tensor"
    return contract.refuses(row.role, row.transposed, row.expert)


def decisions(
    profile: Profile, contract: Contract, method: str, outside: bool, keep: Sequence[str], only: Level | None = None
) -> list[Decision]:
    """The menu of one profile under one engine's rules, priced for one method; only: the one level to offer."""
    forecast, chosen = Forecast.from_index(profile.index), base.get(method)()
    levels: dict[str, list[Level]] = {}
    prices: dict[str, dict[str, float]] = {}
    all_rows = _rows(profile)
    whole = _refusal(profile, contract)
    for row in all_rows:
        priced = profile.prices.get(row.name, {})
        offered = [] if whole or refused(contract, row) else [only] if only else chosen.levels(row.shape[1])
        levels[row.name] = [x for x in offered if contract.takes(x, row.shape[1]) and x.base.name in priced]
        kind = _price_kind(row, chosen.prices)
        prices[row.name] = {x.name: forecast.damage(method, x, priced[x.base.name][kind]) for x in levels[row.name]}
    return menu.build(all_rows, prices, lambda row: levels[row.name], contract.fused, outside, keep)


def _rows(profile: Profile) -> list[SiteRow]:
    return [SiteRow(**(r | {"shape": tuple(r["shape"])})) for r in profile.index["rows"]]


def _refusal(profile: Profile, contract: Contract) -> str | None:
    return contract.refusal(profile.index["family"], any(r["expert"] is not None for r in profile.index["rows"]))


def _price_kind(row: SiteRow, kind: str) -> str:
    """Rows of an embedding or a head are not error-fed through each other."""
    return "gptq" if row.block is None and kind == "two_sided" else kind


def make(
    profile: Profile, budget: Budget, contract: Contract, method: str, keep: Sequence[str], planner: str, uniform: bool
) -> Plan:
    """The plan for a budget. Raises InputError with the achievable range when there is none."""
    only = Level.parse(budget.level) if budget.level else None
    options = decisions(profile, contract, method, budget.size is not None, keep, only)
    if not any(len(d.options) > 1 for d in options):
        raise InputError(f"nothing can be made smaller: {_reasons(profile, contract, method, only)}")
    forecast = Forecast.from_index(profile.index)
    if budget.max_loss is not None:
        choice = lagrange.plan_for_loss(options, forecast.damage_for(method, budget.max_loss))
        limit = sum(d.options[c].nbytes for d, c in zip(options, choice, strict=True))
    elif only:
        choice = [0 if d.inside else len(d.options) - 1 for d in options]
        limit = sum(d.options[c].nbytes for d, c in zip(options, choice, strict=True))
    else:
        limit = budget.limit_for(options, _fixed_bytes(profile, options))
        choice = planners.get("uniform" if uniform else planner).plan(options, limit)
    plain = planners.get("uniform").plan(options, limit)
    bound = lagrange.lower_bound(options, limit)
    return _assemble(profile, budget, contract, method, options, choice, plain, bound)


def _reasons(profile: Profile, contract: Contract, method: str, only: Level | None) -> str:
    """Why no site has a level."""
    if whole := _refusal(profile, contract):
        return f"{whole}; --engine plain simulates it"
    if reasons := sorted({r for row in _rows(profile) if (r := refused(contract, row))}):
        return f"{'; '.join(reasons)}; --engine plain simulates it"
    kinds = [only] if only else base.get(method)().levels(64)
    if not any(contract.takes(x, only.group_size or 64 if only else 64) for x in kinds):
        return f"{contract.name} can't hold what {method} makes ({kinds[0].name} and the like); --engine assay can"
    wanted = f"--level {only.name}" if only else f"--method {method}"
    return f"the profile has no prices for that; run assay profile again with {wanted}"


def _fixed_bytes(profile: Profile, options: Sequence[Decision]) -> int:
    """File bytes that no decision changes: kept tensors, headers, and room for the longer headers to come."""
    decided = sum(d.options[-1].nbytes for d in options)
    names = sum(len(site) for d in options for site in d.sites)
    return int(profile.index["file_bytes"]) - decided + HEADER_PER_SITE * sum(len(d.sites) for d in options) + 4 * names


HEADER_PER_SITE = 420


def _assemble(
    profile: Profile, budget: Budget, contract: Contract, method: str, options: list[Decision],
    choice: list[int], plain: list[int], bound: float,
) -> Plan:  # fmt: skip
    forecast = Forecast.from_index(profile.index)
    damage, nbytes = _totals(options, choice)
    low, expected, high = forecast.kl(method, damage)
    plain_damage, plain_bytes = _totals(options, plain)
    decided = {site for d in options for site in d.sites}
    fixed = sum(b for name, b in profile.index["names"].items() if name not in decided)
    tensors = fixed + nbytes
    choices = {}
    for d, c in zip(options, choice, strict=True):
        option = d.options[c]
        why = _why(d, c)
        for site in d.sites:
            choices[site] = Choice(option.level, option.nbytes // len(d.sites), option.damage / len(d.sites), why)
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
    if expected > 0.9 * other:
        return f"{text}; not distinguishable from uniform {uniform['level']} ({other:.4f})"
    return f"{text}; uniform {uniform['level']} in the same budget: {other:.4f}"


def checked(profile: Profile, plan: Plan, contract: Contract) -> Plan:
    """A plan from a file, its sites and levels checked and its figures computed anew. Raises InputError."""
    if plan.profile != profile.index["calibration"]["digest"] and plan.model != profile.index["model"]:
        raise InputError("the plan was made for another model; run assay plan on a profile of this one")
    outside = any(c.level for n, c in plan.choices.items() if _is_outside(profile, n))
    only = Level.parse(plan.budget["level"]) if "level" in plan.budget else None
    options = decisions(profile, contract, plan.method, outside, (), only)
    validate(plan, options)
    picked = {site: c.level for site, c in plan.choices.items()}
    choice = [[o.level for o in d.options].index(picked[d.sites[0]]) for d in options]
    budget = Budget(**plan.budget)
    damage, _ = _totals(options, choice)
    return _assemble(profile, budget, contract, plan.method, options, choice, choice, damage)


def _is_outside(profile: Profile, name: str) -> bool:
    return any(r["name"] == name and r["block"] is None for r in profile.index["rows"])


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
