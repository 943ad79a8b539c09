"""Plans from profiles: a budget spent on what an engine's contract allows, and a promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.budget import bounds, joint, planners
from assay.budget.assembling import assemble, sentence_of, totals
from assay.budget.caches import CacheChoice
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, SiteRow
from assay.budget.offers import decisions, menus_of, only_level, preferring, priced, roughly, rows, rows_of
from assay.budget.plan import Plan, validate
from assay.budget.planners import uniform as flat
from assay.budget.size import Budget
from assay.budget.speed import Speeds
from assay.budget.spending import Request, buy
from assay.engines.contract import Contract
from assay.engines.layout import check_alike
from assay.engines.serving import server
from assay.measure.footprint import footprint
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.errors import InputError
from assay.model.level import Level


@dataclass(frozen=True)
class Outlook:
    """What a result will be, as far as a budget says. files: most bytes of the weight files; tensors: bytes in them;
    stays: tensors that nothing may compress; levels: of which a plan of one level takes one, empty for others."""

    files: int
    tensors: int
    stays: list[str]
    levels: frozenset[str] = frozenset()


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
    refusal = contract.refusal(model.anatomy.family, model.anatomy.has_experts)
    options = priced(found, refusal, contract, method, budget.whole, keep, only, worth)
    whole, most = bounds.stored(model, contract), sum(d.options[-1].nbytes for d in options)
    fixed, taken = bounds.fixed(whole[0], options, contract), sum(d.options[0].nbytes for d in options)
    levels = {o.level for d in options for o in d.options if o.level} if only else set()
    if budget.bounds_bytes:
        limit = min(bounds.limit(budget, contract, options, whole, footprint(model), cache), most)
        taken = totals(options, flat.plan(options, limit))[1] if uniform else limit
        levels = flat.likely(options, limit) if uniform else levels
    free = {site for d in options if len(d.options) > 1 for site in d.sites}
    stays = [n for n in model.checkpoint.names if n not in free]
    return Outlook(fixed + taken, whole[1] - most + taken, stays, frozenset(levels))


def outlook_of(plan: Plan) -> Outlook:
    """The same for a plan, before its profile is known."""
    stays = [name for name, choice in plan.choices.items() if choice.level is None]
    return Outlook(plan.nbytes_tensors, plan.nbytes_tensors, stays)


@preferring
def make(
    profile: Profile, budget: Budget, contract: Contract, method: str, keep: Sequence[str], planner: str, uniform: bool,
    speeds: Speeds | None = None, cache: CacheChoice | None = None,
) -> Plan:  # fmt: skip
    """The plan for a budget. Raises InputError with the achievable range when there is none.

    speeds: what a budget of time is counted by; cache: one that is given, where the budget would leave the choice.
    """
    planners.get(planner)
    asked = Request(profile, budget, contract, method, "uniform" if uniform else planner, speeds, cache)
    found, problems = [], []
    for options in menus_of(profile, contract, method, budget.whole, keep, only_level(budget)):
        try:
            found.append(_made(asked, options))
        except InputError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return min(found, key=lambda p: (joint.loss_of(p), p.nbytes_tensors)[:: 1 if budget.max_loss is None else -1])


def _made(asked: Request, options: list[Decision]) -> Plan:
    """The plan from one menu."""
    got = buy(asked, options)
    made = assemble(
        asked.profile, asked.budget, asked.contract, asked.method, options, got.choice, got.limit, asked.planner, got.flat,
        got.cache,
    )  # fmt: skip
    return joint.with_cache(made, got.cache, got.tried) if got.cache else made


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
    only = max(plan.levels.values()) if contract.one_level and plan.levels else only_level(budget)
    options = decisions(profile, contract, plan.method, outside, (), only, plan.levels)
    validate(plan, options)
    choice = [[o.level for o in d.options].index(plan.choices[d.sites[0]].level) for d in options]
    cache = joint.cache_of(profile, plan, contract)
    limit = _bound(profile, budget, contract, options, choice, cache)
    made = assemble(profile, budget, contract, plan.method, options, choice, limit, plan.planner, None, cache)
    return joint.with_cache(made, cache) if cache else made


def _bound(
    profile: Profile, budget: Budget, contract: Contract, options: Sequence[Decision], choice: Sequence[int],
    cache: CacheChoice | None,
) -> int:  # fmt: skip
    """Bytes of the budget as it counts them, or those of the choice where it needs more."""
    if budget.memory is None:
        costed, taken = options, totals(options, choice)[1]
    else:
        costed = joint.counted(profile, budget, contract, options)
        taken = joint.held_bytes(profile, contract.name, options, choice)
    if not budget.bounds_bytes:
        return taken
    try:
        return max(taken, bounds.limit_of(profile, budget, contract, costed, cache))
    except InputError:
        if cache is None or not server(contract.name).packed:
            raise
        return taken  # a cache that was edited may leave less than any weights take


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
    costed = joint.counted(profile, budget, contract, options)
    found, ratio = search(costed, limit, tuple(joint.back(costed, options, choice)))
    chosen = joint.back(options, costed, found)
    made = assemble(profile, budget, contract, plan.method, options, chosen, limit, plan.planner, None, cache)
    made = joint.with_cache(made, cache) if cache else made
    low, expected, high = (ratio * value for value in (plan.predicted_low, plan.predicted, plan.predicted_high))
    return joint.joined(dataclasses.replace(made, predicted=expected, predicted_low=low, predicted_high=high,
                                            sentence=sentence_of(expected, low, high, made.uniform)))  # fmt: skip


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
    sentence = sentence_of(expected, low, high, uniform | {"predicted": measured})
    ratio = expected / plan.predicted if plan.predicted else 1.0
    more = plan.more and dict(plan.more) | {"predicted": plan.more["predicted"] * ratio}
    return joint.joined(dataclasses.replace(
        plan, predicted=expected, predicted_low=low, predicted_high=high, uniform=uniform, sentence=sentence, more=more
    ))  # fmt: skip


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
