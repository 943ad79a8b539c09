"""One budget of memory for weights and cache together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.budget import caches, serving
from assay.budget.caches import CacheChoice, CacheMenu, Stored
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision, Option, SiteRow
from assay.budget.offers import rows_of
from assay.budget.plan import Plan
from assay.budget.planners import lagrange
from assay.budget.size import AUTO, Budget
from assay.budget.table import Table
from assay.engines.contract import Contract
from assay.engines.kernels import held_nbytes
from assay.engines.serving import SERVERS, server
from assay.measure.footprint import Footprint
from assay.measure.profile import Profile
from assay.model.errors import InputError
from assay.model.level import Level

CACHE_SPREAD = 0.35
"""Standard deviation of log(measured / predicted) of a cache's loss (benchmarks/joint.py)."""
SHORTLIST = 8
SAID = "; weights and cache together "
MANY = 20_000
Divide = Callable[[Sequence[Decision], int], list[int]]


@dataclass(frozen=True)
class Split:
    """A budget divided: an option for each decision, the cache beside them, and the loss of both in nats per token."""

    choice: list[int]
    cache: CacheChoice
    loss: float


def menu_of(profile: Profile, budget: Budget, contract: Contract) -> CacheMenu | None:
    """What the cache may become, None where the profile has no prices or the budget no context. Raises InputError."""
    wanted = [flag for flag, given in (("--cache auto", budget.cache == AUTO), ("--evict", budget.evict is not None)) if given]
    prices = caches.load(profile.folder) if budget.load is not None else None
    if prices is None:
        if wanted:
            raise InputError(f"{wanted[0]} needs prices of the cache; run assay profile with --cache, the same folder will do")
        return None
    needs = Footprint.from_json(profile.index.get("footprint"))
    assert budget.load is not None
    serving.check(needs, budget.load)
    return CacheMenu.of(prices, needs, budget.load, contract.name)


def undecided(folder: str | Path | None, budget: Budget) -> CacheChoice | None:
    """The least cache that a budget of memory may choose from a profile with prices; None where nothing is to choose."""
    free = budget.memory is not None and budget.cache in (None, AUTO)
    if folder is None or not free or caches.load(Path(folder)) is None:
        return None
    return CacheChoice((Stored(),), None, 0, 0.0)


def choices(menu: CacheMenu, budget: Budget) -> list[CacheChoice]:
    """The caches among which a budget leaves the choice. Raises InputError for a type that the engine lacks."""
    if budget.cache in (None, AUTO) and budget.memory is not None:
        mixed, single = menu.choices(budget.evict), menu.uniform(budget.evict)
        return [*mixed, *(c for c in single if c not in mixed)]
    name = budget.cache or serving.DEFAULT_CACHE
    keys, _, values = name.partition("/")
    return [menu.choice([Stored(keys, values or keys)] * menu.depth, None)]


def divide(
    decisions: Sequence[Decision], offered: Sequence[CacheChoice], room: Callable[[CacheChoice], int],
    loss: Callable[[Sequence[int]], float], planner: Divide,
) -> list[Split]:  # fmt: skip
    """Splits by rising loss, those of `planner` first. room: bytes that a cache leaves for the decisions; loss: of one option
    per decision.

    Every cache is tried with the hull planner's plan in what it leaves, the most promising ones with `planner` instead. So the
    first is no worse than any of these caches with the weights planned apart. Raises InputError where no cache leaves enough.
    """
    least = sum(d.options[0].nbytes for d in decisions)
    fitting = [c for c in offered if room(c) >= least]
    if not fitting:
        raise InputError("no cache leaves enough memory for the weights")
    if len(decisions) > MANY and len(fitting) > 4 * SHORTLIST:
        fitting = [fitting[round(i * (len(fitting) - 1) / (4 * SHORTLIST - 1))] for i in range(4 * SHORTLIST)]
    hulls = lagrange.Prepared.of(decisions, Table.of(decisions))

    def split(choice: list[int], cache: CacheChoice) -> Split:
        return Split(choice, cache, loss(choice) + cache.nats)

    tried = sorted((split(hulls.plan(room(c)).tolist(), c) for c in fitting), key=_order)
    if planner is not lagrange.plan:
        tried[:SHORTLIST] = sorted((split(planner(decisions, room(s.cache)), s.cache) for s in tried[:SHORTLIST]), key=_order)
    return tried


def _order(split: Split) -> tuple[float, int]:
    return split.loss, split.cache.nbytes


def planned_loss(options: Sequence[Decision], forecast: Forecast, method: str) -> Callable[[Sequence[int]], float]:
    """Predicted KL of one option per decision, nats per token."""
    return lambda choice: forecast.kl(method, forecast.total(d.options[c] for d, c in zip(options, choice, strict=True)))[1]


def rows_by_site(profile: Profile) -> dict[str, SiteRow]:
    """The sites of a profile by name."""
    return {row.name: row for row in rows_of(profile)}


def held_bytes(profile: Profile, engine: str, options: Sequence[Decision], choice: Sequence[int]) -> int:
    """Bytes of the chosen options as the engine holds them in memory."""
    picked = [dataclasses.replace(d, options=(d.options[c], d.options[-1])) for d, c in zip(options, choice, strict=True)]
    known = engine in SERVERS and not SERVERS[engine].embeds
    return sum(d.options[0].nbytes for d in (held(picked, rows_by_site(profile), engine) if known else picked))


def held_table(options: Sequence[Decision], rows: Mapping[str, SiteRow], engine: str) -> list[list[int]]:
    """`held_bytes` of every option of every decision. rows: of all sites by name."""
    if engine not in SERVERS or SERVERS[engine].embeds:
        return [[o.nbytes for o in d.options] for d in options]
    known: dict[tuple[str | None, tuple[int, int], int], int] = {}

    def taken(level: str | None, decision: Decision) -> int:
        own, kept, total = [rows[site] for site in decision.sites], decision.options[-1].nbytes, 0
        if level is None or any(row.role == "embedding" for row in own):
            return kept
        for row in own:
            key = (level, row.shape, row.scale_itemsize)
            if key not in known:
                known[key] = held_nbytes(Level.parse(level), *row.shape, row.scale_itemsize)
            total += known[key]
        return min(total, kept)

    return [[taken(o.level, d) for o in d.options] for d in options]


def held(options: Sequence[Decision], rows: Mapping[str, SiteRow], engine: str) -> list[Decision]:
    """The decisions by the bytes that they take in memory while the engine runs: its own, where it unpacks.

    rows: of all sites by name. An embedding that the engine decodes has no choice.
    """
    if server(engine).embeds:
        return list(options)
    return [_held(d, [rows[site] for site in d.sites]) for d in options]


def counted(profile: Profile, budget: Budget, contract: Contract, options: Sequence[Decision]) -> list[Decision]:
    """The decisions by the bytes that a budget counts: those in memory (`held`), or those of the files."""
    return held(options, rows_by_site(profile), contract.name) if budget.memory is not None else list(options)


def _held(decision: Decision, rows: Sequence[SiteRow]) -> Decision:
    kept = decision.options[-1]
    if any(row.role == "embedding" for row in rows):
        return dataclasses.replace(decision, options=(kept,))
    made = [
        Option(o.level, sum(held_nbytes(Level.parse(o.level), *r.shape, r.scale_itemsize) for r in rows), o.damage)
        for o in decision.options if o.level is not None
    ]  # fmt: skip
    useful: list[Option] = []
    for option in sorted(made, key=lambda o: (o.nbytes, o.damage)):
        if option.nbytes < kept.nbytes and (not useful or option.damage < useful[-1].damage):
            useful.append(option)
    return dataclasses.replace(decision, options=(*useful, kept))


def back(options: Sequence[Decision], costed: Sequence[Decision], choice: Sequence[int]) -> list[int]:
    """Options of decisions costed otherwise as indices into the original ones."""
    return [
        next(i for i, o in enumerate(d.options) if o.level == c.options[k].level)
        for d, c, k in zip(options, costed, choice, strict=True)
    ]


def with_cache(plan: Plan, cache: CacheChoice, tried: Sequence[Split] = ()) -> Plan:
    """A plan that says what becomes of the cache: a line a layer, and its loss.

    tried: splits of the same budget; those with one cache for all layers are named with their loss.
    """
    alone = {s.cache.title: s.loss for s in tried if len({*s.cache.layers}) == 1 and s.cache.evict is None}
    stated = {"layers": [str(one) for one in cache.layers], "evict": cache.evict, "nats": cache.nats, "alone": alone}
    return joined(dataclasses.replace(plan, cache=stated))


def joined(plan: Plan) -> Plan:
    """A plan whose cache says the loss of weights and cache together, from that of the weights as it is now."""
    if not plan.cache:
        return plan
    nats = float(plan.cache["nats"])
    narrow, wide = (nats * abs(math.expm1(sign * 1.96 * CACHE_SPREAD)) for sign in (-1, 1))
    expected = plan.predicted + nats
    found = {
        "predicted": expected,
        "predicted_low": expected - math.hypot(plan.predicted - plan.predicted_low, narrow),
        "predicted_high": expected + math.hypot(plan.predicted_high - plan.predicted, wide),
    }  # fmt: skip
    said, _, after = plan.sentence.partition(SAID)
    said += "".join(after.partition(";")[1:])
    if nats:
        said += f"{SAID}{expected:.4f} ({found['predicted_low']:.4f} to {found['predicted_high']:.4f})"
    return dataclasses.replace(plan, cache=dict(plan.cache) | found, sentence=said)


def left_of(loss: float, cache: CacheChoice | None) -> float:
    """What a bound on the loss leaves for the weights: the bound without the upper end of the cache's. Raises InputError."""
    most = cache.nats * math.exp(1.96 * CACHE_SPREAD) if cache else 0.0
    if cache and most >= loss:
        raise InputError(f"--max-loss {loss} leaves nothing for the weights: {cache.title} alone may cost {most:.2g} nats/token; "
                         "take a finer --cache or a larger bound")  # fmt: skip
    return loss - most


def loss_of(plan: Plan) -> float:
    """Predicted loss of weights and cache, nats per token."""
    return plan.predicted + float(plan.cache.get("nats", 0.0))


def cache_of(profile: Profile, plan: Plan, contract: Contract) -> CacheChoice | None:
    """The cache that a plan's file states, its bytes and loss computed anew; None where it states none. Raises InputError."""
    if not plan.cache:
        return None
    menu = menu_of(profile, Budget(**plan.budget), contract)
    if menu is None:
        raise InputError("the plan states a cache, which needs prices; run assay profile with --cache, the same folder will do")
    return read(plan.cache, menu)


def read(stated: Mapping[str, Any], menu: CacheMenu) -> CacheChoice:
    """The cache of a plan's file, its bytes and loss computed anew. Raises InputError."""
    lines, evict = stated.get("layers"), stated.get("evict")
    if not isinstance(lines, list) or not isinstance(evict, str | None):
        raise InputError("the plan's cache must have layers, one line each like fp8 fp8, and evict: a policy or null")
    layers = [Stored.parse(line) for line in lines]
    if evict is not None:
        menu.shares(evict)
    elif any(one.share < 1 for one in layers):
        raise InputError("the plan's cache drops tokens; name the policy with evict: snapkv or streaming_llm")
    return menu.choice(layers, evict)
