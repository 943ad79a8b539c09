"""The plan that a choice of options makes: its levels with reasons, exact bytes, and what it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from assay.budget import bounds, joint, planners, serving
from assay.budget.caches import CacheChoice
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, Option, SiteRow
from assay.budget.offers import rows_of
from assay.budget.plan import Choice, Plan
from assay.budget.planners import lagrange
from assay.budget.size import Budget
from assay.engines.contract import Contract
from assay.engines.serving import GIB
from assay.measure.profile import Profile
from assay.model.level import Level

SLOW = ("integer", "dynamic")
"""Planners that do no worse than `lagrange`, in whose place it says quickly what more bytes would buy."""


def assemble(
    profile: Profile, budget: Budget, contract: Contract, method: str, options: list[Decision],
    choice: list[int], limit: int, planner: str, flat: list[int] | None = None, cache: CacheChoice | None = None,
) -> Plan:  # fmt: skip
    """The plan of one option per decision. limit: bytes that they might take, as the budget counts them; planner: its name;
    flat: the best single level if not by those bytes."""
    costed = joint.counted(profile, budget, contract, options)
    plain = flat or joint.back(options, costed, planners.get("uniform").plan(costed, limit))
    bound = lagrange.lower_bound(costed, limit)
    forecast = Forecast.from_index(profile.index)
    damage, nbytes = totals(options, choice)
    low, expected, high = forecast.kl(method, forecast.total(_picked(options, choice)))
    plain_bytes = totals(options, plain)[1]
    fixed = bounds.whole_of(profile, contract)[1] - sum(d.options[-1].nbytes for d in options)
    tensors = fixed + nbytes
    more = _more(costed, limit, tensors, planner, joint.planned_loss(costed, forecast, method)) if budget.bounds_bytes else {}
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
        gap=max(0.0, damage - bound) / bound if bound > 0 else 0.0, sentence=sentence_of(expected, low, high, uniform),
        serving=_serving(profile, budget, contract, fixed + joint.held_bytes(profile, contract.name, options, choice), cache),
        more=more if more and more["predicted"] < expected else {},
        planner=planner,
    )  # fmt: skip


def _nbytes(contract: Contract, row: SiteRow, level: str | None) -> int:
    return row.stored_bytes if level is None else contract.nbytes(Level.parse(level), *row.shape, row.scale_itemsize)


def _serving(profile: Profile, budget: Budget, contract: Contract, weights: int, cache: CacheChoice | None) -> dict[str, Any]:
    """Memory of the result at the context that the budget names; empty where it names none."""
    if budget.load is None:
        return {}
    decoded = sum(profile.index["names"].values())
    return serving.summary(bounds.needs_of(profile), budget.load, contract.name, weights, decoded, cache)


def _more(
    options: list[Decision], limit: int, tensors: int, planner: str, promised: Callable[[Sequence[int]], float]
) -> dict[str, Any]:
    """What a GiB more would buy, or an eighth more where the weights take less than 8 GiB; empty when nothing is left to buy."""
    step = min(GIB, tensors // 8)
    most = sum(d.options[-1].nbytes for d in options)
    if limit >= most:
        return {}
    quick = lagrange if planner in SLOW else planners.get(planner)
    return {"bytes": step, "predicted": promised(quick.plan(options, min(limit + step, most)))}


def _picked(options: Sequence[Decision], choice: Sequence[int]) -> list[Option]:
    return [d.options[c] for d, c in zip(options, choice, strict=True)]


def totals(options: Sequence[Decision], choice: Sequence[int]) -> tuple[float, int]:
    """Damage in nats per token and bytes of one option per decision."""
    picked = _picked(options, choice)
    return sum(o.damage for o in picked), sum(o.nbytes for o in picked)


def _bits(options: Sequence[Decision], choice: Sequence[int]) -> float:
    inside = [(d.options[c].nbytes, d.count) for d, c in zip(options, choice, strict=True) if d.inside]
    return 8 * sum(b for b, _ in inside) / max(1, sum(n for _, n in inside))


def _common(options: Sequence[Decision], choice: Sequence[int]) -> str | None:
    """The level of most matrices in the blocks that there is a choice for, or else outside them; None if that is as they are."""
    free = [(d.inside, d.options[c].level) for d, c in zip(options, choice, strict=True) if len(d.options) > 1]
    levels = [level for inside, level in free if inside] or [level for _, level in free]
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


def sentence_of(expected: float, low: float, high: float, uniform: Mapping[str, Any]) -> str:
    """The promise in words, beside the best uniform plan's."""
    text = f"predicted KL {expected:.4f} nats/token ({low:.4f} to {high:.4f})"
    other = uniform["predicted"]
    if uniform["level"] is None:
        return f"{text}; the budget holds every matrix as it is"
    if expected == other:
        return f"{text}; uniform {uniform['level']}"
    if 0.9 * other < expected < other / 0.9:
        return f"{text}; not distinguishable from uniform {uniform['level']} ({other:.4f})"
    return f"{text}; uniform {uniform['level']} in the same budget: {other:.4f}"
