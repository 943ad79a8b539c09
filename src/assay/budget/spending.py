"""What a budget buys from a menu: so many bytes, a loss, milliseconds, or a memory that weights and cache share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay.budget import bounds, joint, planners
from assay.budget.assembling import totals
from assay.budget.caches import CacheChoice, CacheMenu
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision
from assay.budget.offers import rows_of
from assay.budget.size import Budget
from assay.budget.speed import Speeds
from assay.engines.contract import Contract
from assay.measure.profile import Profile
from assay.model.errors import InputError


@dataclass(frozen=True)
class Request:
    """What a plan is asked for. planner: its name; speeds: what a budget of time is counted by; cache: one that is given."""

    profile: Profile
    budget: Budget
    contract: Contract
    method: str
    planner: str
    speeds: Speeds | None = None
    cache: CacheChoice | None = None

    @property
    def divide(self) -> joint.Divide:
        """The planner's function."""
        found: joint.Divide = planners.get(self.planner).plan
        return found


@dataclass(frozen=True)
class Purchase:
    """An option for each decision, and the bytes that they may take, as the budget counts them (`joint.counted`).

    flat: the best single level in the same budget, where bytes don't say; cache: what stands beside the weights, if that was
    to be said; tried: other ways to divide the memory.
    """

    choice: list[int]
    limit: int
    flat: list[int] | None = None
    cache: CacheChoice | None = None
    tried: tuple[joint.Split, ...] = ()


def buy(asked: Request, options: Sequence[Decision]) -> Purchase:
    """The best that the budget allows. Raises InputError with the achievable range where it allows nothing."""
    budget = asked.budget
    menu = joint.menu_of(asked.profile, budget, asked.contract)
    if budget.memory is not None and menu is not None:
        return _with_cache(asked, options, menu)
    cache = joint.choices(menu, budget)[0] if menu is not None and asked.cache is None else asked.cache
    if budget.max_loss is not None:
        return _for_loss(asked, options, budget.max_loss, cache)
    if budget.level:
        choice = [0 if d.inside else len(d.options) - 1 for d in options]
        return Purchase(choice, totals(options, choice)[1], cache=cache)
    if budget.milliseconds is not None:
        return _for_time(asked, options, budget.milliseconds, cache)
    costed = joint.counted(asked.profile, budget, asked.contract, options)
    limit = bounds.limit_of(asked.profile, budget, asked.contract, costed)
    return Purchase(joint.back(options, costed, asked.divide(costed, limit)), limit, cache=cache)


def _for_loss(asked: Request, options: Sequence[Decision], loss: float, cache: CacheChoice | None) -> Purchase:
    planner = planners.get(asked.planner)
    if not hasattr(planner, "plan_for_loss"):
        *able, last = (name for name in planners.names() if hasattr(planners.get(name), "plan_for_loss"))
        raise InputError(f"--planner {asked.planner} spends a size, not a loss; with --max-loss use {', '.join(able)} or {last}")
    left = joint.left_of(loss, cache)
    choice = planner.plan_for_loss(options, Forecast.from_index(asked.profile.index).damage_for(asked.method, left))
    return Purchase(choice, totals(options, choice)[1], cache=cache)


def _for_time(asked: Request, options: Sequence[Decision], milliseconds: float, cache: CacheChoice | None) -> Purchase:
    if asked.speeds is None:
        raise InputError("a budget of time needs --speeds: a file that assay benchmark writes")
    shapes = {row.name: row.shape for row in rows_of(asked.profile)}
    choice = asked.speeds.plan(options, shapes, milliseconds, asked.divide)
    flat = asked.speeds.plan(options, shapes, milliseconds, planners.get("uniform").plan)
    return Purchase(choice, totals(options, choice)[1], flat, cache)


def _with_cache(asked: Request, options: Sequence[Decision], menu: CacheMenu) -> Purchase:
    """Weights and cache out of one memory."""
    costed = joint.counted(asked.profile, asked.budget, asked.contract, options)
    offered = [asked.cache] if asked.cache else joint.choices(menu, asked.budget)
    room = bounds.rooms(asked.profile, asked.budget, asked.contract, costed, offered)
    loss = joint.planned_loss(costed, Forecast.from_index(asked.profile.index), asked.method)
    best, *others = joint.divide(costed, offered, room, loss, asked.divide)
    choice = joint.back(options, costed, best.choice)
    return Purchase(choice, room(best.cache), cache=best.cache, tried=(best, *others))
