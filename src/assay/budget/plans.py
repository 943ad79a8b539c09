"""Plans from profiles: a budget spent on what an engine's contract allows, and a promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.budget import joint, planners, serving
from assay.budget.caches import CacheChoice
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, Option, SiteRow
from assay.budget.offers import decisions, menus_of, only_level, preferring, priced, roughly, rows, rows_of
from assay.budget.plan import Choice, Plan, validate
from assay.budget.planners import lagrange
from assay.budget.size import Budget, parse_size
from assay.budget.speed import Speeds
from assay.engines.contract import Contract
from assay.engines.gguf.write import whole_bytes
from assay.engines.layout import check_alike
from assay.engines.serving import GIB, server
from assay.measure.footprint import Footprint, footprint
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.errors import InputError
from assay.model.level import Level


@dataclass(frozen=True)
class Outlook:
    """What a result will be, as far as a budget says. files: most bytes of the weight files; tensors: bytes in them;
    stays: tensors that nothing may compress."""

    files: int
    tensors: int
    stays: list[str]


@preferring
def outlook(
    model: StreamedModel, budget: Budget, contract: Contract, method: str, keep: Sequence[str], uniform: bool = False,
    cache: CacheChoice | None = None,
) -> Outlook:  # fmt: skip
    """What the result will be within a budget, told before anything is measured.

    For a bound on the loss the fewest bytes that are possible. uniform: one level, taken by how well it holds a few weights;
    cache: the one that memory is left for, if not the budget's. Raises InputError for what no measurement can make possible.
    """
    found, only = rows(model, model.checkpoint.kept_nbytes), only_level(budget)
    worth = roughly(model) if uniform else lambda row, level: 0.0
    options = priced(found, model.anatomy.family, contract, method, budget.whole, keep, only, worth)
    whole, most = _stored(model, contract), sum(d.options[-1].nbytes for d in options)
    fixed, taken = _fixed_bytes(whole[0], options, contract), sum(d.options[0].nbytes for d in options)
    if budget.bounds_bytes:
        limit = min(_limit(budget, contract, options, whole, footprint(model), cache), most)
        taken = _totals(options, planners.get("uniform").plan(options, limit))[1] if uniform else limit
    free = {site for d in options if len(d.options) > 1 for site in d.sites}
    return Outlook(fixed + taken, whole[1] - most + taken, [n for n in model.checkpoint.names if n not in free])


def outlook_of(plan: Plan) -> Outlook:
    """The same for a plan, before its profile is known."""
    return Outlook(plan.nbytes_tensors, plan.nbytes_tensors, [n for n, c in plan.choices.items() if c.level is None])


def _stored(model: StreamedModel, contract: Contract) -> tuple[int, int]:
    """Bytes of the files and of the tensors in them if every tensor stays. Raises InputError where there are none."""
    checkpoint = model.checkpoint
    if contract.layout == "gguf":
        return whole_bytes(checkpoint)
    return checkpoint.kept_file_bytes, sum(checkpoint.kept_nbytes(name) for name in checkpoint.names)


def _limit(
    budget: Budget, contract: Contract, options: Sequence[Decision], whole: tuple[int, int], needs: Footprint,
    cache: CacheChoice | None = None,
) -> int:  # fmt: skip
    """Bytes that the decisions may take together. whole: see `_stored`; cache: a planned one."""
    if budget.memory is None:
        return budget.limit_for(options, _fixed_bytes(whole[0], options, contract))
    assert budget.load is not None, "a budget of memory says for what"
    total = parse_size(budget.memory)
    beside = total - serving.room(needs, budget.load, contract.name, total, cache)
    return budget.limit_for(options, whole[1] - sum(d.options[-1].nbytes for d in options), beside)


def _limit_of(
    profile: Profile, budget: Budget, contract: Contract, options: Sequence[Decision], cache: CacheChoice | None = None
) -> int:
    needs = _footprint(profile) if budget.memory is not None else Footprint((), 0, 0, 0, None, None)
    return _limit(budget, contract, options, _whole(profile, contract), needs, cache)


def _footprint(profile: Profile) -> Footprint:
    return Footprint.from_json(profile.index.get("footprint"))


@preferring
def make(
    profile: Profile, budget: Budget, contract: Contract, method: str, keep: Sequence[str], planner: str, uniform: bool,
    speeds: Speeds | None = None, cache: CacheChoice | None = None,
) -> Plan:  # fmt: skip
    """The plan for a budget. Raises InputError with the achievable range when there is none.

    speeds: what a budget of time is counted by; cache: one that is given, where the budget would leave the choice.
    """
    found, problems = [], []
    for options in menus_of(profile, contract, method, budget.whole, keep, only_level(budget)):
        try:
            found.append(_spent(profile, budget, contract, method, options, planner, uniform, speeds, cache))
        except InputError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return min(found, key=lambda p: (joint.loss_of(p), p.nbytes_tensors)[:: 1 if budget.max_loss is None else -1])


def _spent(
    profile: Profile, budget: Budget, contract: Contract, method: str, options: list[Decision], planner: str, uniform: bool,
    speeds: Speeds | None, cache: CacheChoice | None,
) -> Plan:  # fmt: skip
    """The plan that a planner makes of one menu."""
    flat, menu = None, joint.menu_of(profile, budget, contract)
    alone: list[joint.Split] = []
    forecast = Forecast.from_index(profile.index)
    if budget.max_loss is not None:
        search = planners.get("lagrange" if uniform else planner)
        if not hasattr(search, "plan_for_loss"):
            raise InputError(f"--planner {planner} spends a size, not a loss; with --max-loss use lagrange or bisection")
        choice = search.plan_for_loss(options, forecast.damage_for(method, budget.max_loss))
        limit = sum(d.options[c].nbytes for d, c in zip(options, choice, strict=True))
    elif budget.level:
        choice = [0 if d.inside else len(d.options) - 1 for d in options]
        limit = sum(d.options[c].nbytes for d, c in zip(options, choice, strict=True))
    elif budget.milliseconds is not None:
        if speeds is None:
            raise InputError("a budget of time needs --speeds: a file that assay benchmark writes")
        divide, shapes = planners.get("uniform" if uniform else planner).plan, {row.name: row.shape for row in rows_of(profile)}
        choice = speeds.plan(options, shapes, budget.milliseconds, divide)
        flat = speeds.plan(options, shapes, budget.milliseconds, planners.get("uniform").plan)
        limit = _totals(options, choice)[1]
    elif budget.memory is not None and (menu or not server(contract.name).embeds):
        costed = joint.held(options, joint.rows_by_site(profile), contract.name)
        offered = [] if menu is None else [cache] if cache else joint.choices(menu, budget)
        room = _room(profile, budget, contract, costed, offered or [None])
        divide = planners.get("uniform" if uniform else planner).plan
        if menu is None:
            choice = divide(costed, room(None))
        else:
            best, *others = joint.divide(costed, offered, room, joint.planned_loss(costed, forecast, method), divide)
            choice, cache, alone = best.choice, best.cache, [best, *others]
        limit, flat = room(cache), planners.get("uniform").plan(costed, room(cache))
        if costed != options:
            choice, flat = joint.back(options, costed, choice), joint.back(options, costed, flat)
            limit = _totals(options, choice)[1]
    else:
        limit = _limit_of(profile, budget, contract, options)
        choice = planners.get("uniform" if uniform else planner).plan(options, limit)
    if menu is not None and cache is None:
        cache = joint.choices(menu, budget)[0]
    made = _assemble(profile, budget, contract, method, options, choice, limit, flat, cache)
    return joint.with_cache(made, cache, alone) if cache else made


def _room(
    profile: Profile, budget: Budget, contract: Contract, costed: Sequence[Decision], offered: Sequence[CacheChoice | None]
) -> Callable[[CacheChoice | None], int]:
    """Bytes that a cache leaves for the decisions. Raises InputError with the range where even the smallest leaves too few."""
    needs, load = _footprint(profile), budget.load
    assert load is not None
    beside = {id(c): sum(serving.overheads(needs, load, contract.name, c).values()) for c in offered}
    least = min(offered, key=lambda c: beside[id(c)])
    limit = _limit_of(profile, budget, contract, costed, least)
    return lambda c: limit + beside[id(least)] - beside[id(c)]


def _whole(profile: Profile, contract: Contract) -> tuple[int, int]:
    """`_stored` of the model that was profiled. Raises InputError where there is no such file."""
    if contract.layout != "gguf":
        return int(profile.index["file_bytes"]), sum(profile.index["names"].values())
    found = profile.index.get("gguf", {"refused": f"{profile.folder} says nothing about GGUF; run assay profile again"})
    if "refused" in found:
        raise InputError(found["refused"])
    return int(found["file_bytes"]), int(found["tensor_bytes"])


def _fixed_bytes(file_bytes: int, options: Sequence[Decision], contract: Contract) -> int:
    """File bytes that no decision changes: kept tensors, headers, and room for the longer headers to come."""
    decided = sum(d.options[-1].nbytes for d in options)
    if contract.layout == "gguf":
        return file_bytes - decided + ALIGNMENT * sum(len(d.sites) for d in options)
    names = sum(len(site) for d in options for site in d.sites)
    return file_bytes - decided + HEADER_PER_SITE * sum(len(d.sites) for d in options) + 4 * names


HEADER_PER_SITE = 420
ALIGNMENT = 32
"""Of the tensors in a GGUF file, whose headers are as long for any level."""


def _assemble(
    profile: Profile, budget: Budget, contract: Contract, method: str, options: list[Decision],
    choice: list[int], limit: int, flat: list[int] | None = None, cache: CacheChoice | None = None,
) -> Plan:  # fmt: skip
    plain, bound = flat or planners.get("uniform").plan(options, limit), lagrange.lower_bound(options, limit)
    forecast = Forecast.from_index(profile.index)
    damage, nbytes = _totals(options, choice)
    low, expected, high = forecast.kl(method, forecast.total(_picked(options, choice)))
    plain_bytes = _totals(options, plain)[1]
    fixed = _whole(profile, contract)[1] - sum(d.options[-1].nbytes for d in options)
    tensors = fixed + nbytes
    own = {row.name: row for row in rows_of(profile)}
    choices = {}
    for d, c in zip(options, choice, strict=True):
        option = d.options[c]
        why = _why(d, c)
        for site in d.sites:
            choices[site] = Choice(option.level, _nbytes(contract, own[site], option.level), option.damage / len(d.sites), why)
    uniform = {
        "level": _common(options, plain), "nbytes": fixed + plain_bytes, "bits": _bits(options, plain),
        "predicted": forecast.kl(method, forecast.total(_picked(options, plain)))[1],
    }  # fmt: skip
    return Plan(
        model=profile.index["model"], profile=profile.index["calibration"]["digest"], engine=contract.name, method=method,
        budget={k: v for k, v in dataclasses.asdict(budget).items() if v is not None}, choices=choices,
        nbytes_tensors=tensors, bits=_bits(options, choice), bits_all=8 * tensors / int(profile.index["parameters"]),
        predicted=expected, predicted_low=low, predicted_high=high, uniform=uniform,
        gap=max(0.0, damage - bound) / bound if bound > 0 else 0.0, sentence=_sentence(expected, low, high, uniform),
        serving=_serving(profile, budget, contract, fixed + joint.held_bytes(profile, contract.name, options, choice), cache),
        more=_more(options, limit, tensors, forecast, method) if budget.bounds_bytes else {},
    )  # fmt: skip


def _nbytes(contract: Contract, row: SiteRow, level: str | None) -> int:
    return row.stored_bytes if level is None else contract.nbytes(Level.parse(level), *row.shape, row.scale_itemsize)


def _serving(profile: Profile, budget: Budget, contract: Contract, weights: int, cache: CacheChoice | None) -> dict[str, Any]:
    """Memory of the result at the context that the budget names; empty where it names none."""
    if budget.load is None:
        return {}
    return serving.summary(_footprint(profile), budget.load, contract.name, weights, sum(profile.index["names"].values()), cache)


def _more(options: list[Decision], limit: int, tensors: int, forecast: Forecast, method: str) -> dict[str, Any]:
    """What a GiB more would buy, or an eighth more where the weights take less than 8 GiB; empty when nothing is left to buy."""
    step = min(GIB, tensors // 8)
    most = sum(d.options[-1].nbytes for d in options)
    if limit >= most:
        return {}
    bought = _picked(options, lagrange.plan(options, min(limit + step, most)))
    return {"bytes": step, "predicted": forecast.kl(method, forecast.total(bought))[1]}


def _picked(options: Sequence[Decision], choice: Sequence[int]) -> list[Option]:
    return [d.options[c] for d, c in zip(options, choice, strict=True)]


def _totals(options: Sequence[Decision], choice: Sequence[int]) -> tuple[float, int]:
    picked = _picked(options, choice)
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
    smaller = min(decision.options[:index], key=lambda o: o.damage)
    if smaller.damage <= option.damage:
        return f"{smaller.level} takes fewer bytes and is predicted to lose less"
    saved, cost = option.nbytes - smaller.nbytes, smaller.damage - option.damage
    return f"{smaller.level} would save {saved} bytes for {cost:.2g} nats more"


def _sentence(expected: float, low: float, high: float, uniform: Mapping[str, Any]) -> str:
    text, other = f"predicted KL {expected:.4f} nats/token ({low:.4f} to {high:.4f})", uniform["predicted"]
    if 0.9 * other < expected < other / 0.9:
        return f"{text}; not distinguishable from uniform {uniform['level']} ({other:.4f})"
    return f"{text}; uniform {uniform['level']} in the same budget: {other:.4f}"


def checked(profile: Profile, plan: Plan, contract: Contract) -> Plan:
    """A plan from a file, its origin, sites and levels checked and its figures computed anew. Raises InputError.

    What is uniform in its sentence is the best single level in its budget, or in its bytes where an edit needs more.
    """
    check_origin(plan, profile.index["model"], profile.index["calibration"]["digest"])
    known = {row.name: row for row in rows_of(profile)}
    for name in [n for n in plan.levels if n in known]:
        _check_group_size(known[name], plan.levels[name])
    if contract.one_level:
        check_alike(plan.levels, contract.name)
    budget, contract = Budget(**plan.budget), contract.narrowest(plan.levels.values())
    outside = budget.whole or any(known[n].block is None for n in plan.levels if n in known)
    options = decisions(profile, contract, plan.method, outside, (), only_level(budget), plan.levels)
    validate(plan, options)
    choice = [[o.level for o in d.options].index(plan.choices[d.sites[0]].level) for d in options]
    cache = joint.cache_of(profile, plan, contract)
    limit = _bound(profile, budget, contract, options, choice, cache)
    made = _assemble(profile, budget, contract, plan.method, options, choice, limit, None, cache)
    return joint.with_cache(made, cache) if cache else made


def _bound(
    profile: Profile, budget: Budget, contract: Contract, options: Sequence[Decision], choice: Sequence[int],
    cache: CacheChoice | None,
) -> int:  # fmt: skip
    """Bytes of the budget, or those of the choice where it needs more, or where the engine holds other bytes than the files."""
    taken = _totals(options, choice)[1]
    if not budget.bounds_bytes or (budget.memory is not None and not server(contract.name).embeds):
        return taken
    return max(taken, _limit_of(profile, budget, contract, options, cache))


Search = Callable[[Sequence[Decision], int, tuple[int, ...]], tuple[tuple[int, ...], float]]
"""From a menu, the bytes that may be taken and the chosen options to other ones, and what they make of the KL."""


def changed(profile: Profile, plan: Plan, contract: Contract, keep: Sequence[str], search: Search) -> Plan:
    """The plan with other options that `search` finds in the same budget, its promise scaled by their measured KL."""
    budget, contract = Budget(**plan.budget), contract.narrowest(plan.levels.values())
    only = max(plan.levels.values()) if contract.one_level and plan.levels else None
    options = decisions(profile, contract, plan.method, budget.whole, keep, only)
    choice = tuple([o.level for o in d.options].index(plan.choices[d.sites[0]].level) for d in options)
    cache = joint.cache_of(profile, plan, contract)
    limit = _bound(profile, budget, contract, options, choice, cache)
    found, ratio = search(options, limit, choice)
    made = _assemble(profile, budget, contract, plan.method, options, list(found), limit, None, cache)
    made = joint.with_cache(made, cache) if cache else made
    low, expected, high = (ratio * value for value in (plan.predicted_low, plan.predicted, plan.predicted_high))
    return joint.joined(dataclasses.replace(made, predicted=expected, predicted_low=low, predicted_high=high,
                                            sentence=_sentence(expected, low, high, made.uniform)))  # fmt: skip


def check_origin(plan: Plan, model: str, text: str | None) -> None:
    """Refuse a plan of another model or profile. model: fingerprint; text: digest, None where not known yet."""
    if plan.model != model:
        raise InputError("the plan was made for another model; run assay plan on a profile of this one")
    if text is not None and plan.profile != text:
        raise InputError("the plan was made from another profile; give that one with --profile, or run assay plan on this one")


def _check_group_size(row: SiteRow, level: Level) -> None:
    try:
        level.groups(row.shape[1])
    except InputError as error:
        raise InputError(f"{row.name}: {error}") from None


def uniform_twin(profile: Profile, plan: Plan, contract: Contract, keep: Sequence[str]) -> Plan | None:
    """The best uniform plan of the same budget, or None where there is none or it is the same plan."""
    budget = Budget(**plan.budget)
    if not budget.bounds_bytes:
        return None
    cache = joint.cache_of(profile, plan, contract)
    twin = make(profile, budget, contract, plan.method, keep, "uniform", True, cache=cache)
    same = all(twin.choices[n].level == c.level for n, c in plan.choices.items())
    return None if same else twin


def corrected(profile: Profile, plan: Plan, twin: Plan, measured: float) -> Plan:
    """The plan with its promise corrected by its uniform twin's measured KL (nats per token)."""
    forecast = Forecast.from_index(profile.index)
    low, expected, high = forecast.corrected(plan.predicted, twin.predicted, measured)
    uniform = dict(plan.uniform) | {"measured": measured}
    sentence = _sentence(expected, low, high, uniform | {"predicted": measured})
    ratio = expected / plan.predicted if plan.predicted else 1.0
    more = plan.more and dict(plan.more) | {"predicted": plan.more["predicted"] * ratio}
    return dataclasses.replace(
        plan, predicted=expected, predicted_low=low, predicted_high=high, uniform=uniform, sentence=sentence, more=more
    )


def polished(plan: Plan, polish: Mapping[str, Any]) -> Plan:
    """The plan with its promise scaled as tuning the whole model changed the KL on held-out text.

    polish: `before` and `after` in nats per token, and whether the tuned model is `used`.
    """
    before, after = polish["before"], polish["after"]
    if not polish["used"]:
        return dataclasses.replace(plan, sentence=f"{plan.sentence}; polishing didn't lower {before:.4f} on held-out text")
    ratio = after / before
    return joint.joined(dataclasses.replace(
        plan, predicted=ratio * plan.predicted, predicted_low=ratio * plan.predicted_low,
        predicted_high=ratio * plan.predicted_high,
        sentence=f"{plan.sentence}; polished on held-out text from {before:.4f} to {after:.4f}",
    ))  # fmt: skip
