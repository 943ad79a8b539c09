"""Probes: the few measurements of the running model that turn prices into promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.budget.forecast import UNKNOWN_SPREAD
from assay.budget.prices import InputCosts, Prices, begin_price, price, rotates
from assay.measure.curvatures import Curvatures
from assay.measure.damage import Curvature
from assay.measure.experts import ENOUGH_TOKENS, Typical
from assay.measure.precision import stored_precision
from assay.measure.stream import Override, StreamedModel, read_weight
from assay.measure.text import Windows
from assay.methods import base
from assay.methods.grid.integer import IntegerGrid
from assay.model import memory
from assay.model.alike import alike
from assay.model.level import Level
from assay.model.progress import PRICING, REHEARSING, Progress
from assay.model.sites import Site
from assay.model.threads import Begin, ahead, background, now, side_by_side, threads_for
from assay.prove.divergence import Candidate, compare

PROBED_BITS = (4, 3, 2)
FIRST_BITS = 3
REST = "all but the first block"
FIRST_LIMITS = (0.5, 2.0)
"""What `Probes.first` is cut to: beyond is noise of a model that hardly loses anything."""
GROUP = 64
PRICED_AHEAD = 3
"""Weights whose rounding may be under way while the next is read."""
REHEARSED_ROWS = 1024
REHEARSED_WIDTH = 2
"""Times the block's median number of inputs; a solver's factorisation takes its cube, and what it leaves is the same share."""


def price_model(model: StreamedModel, folder: Path, total: int, menus: Sequence[Callable[[int], list[Level]]],
                progress: Progress) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """Prices of every site at every level of the menus, block by block."""
    prices: dict[str, dict[str, dict[str, float]]] = {}
    blocks: list[int | None] = [*range(len(model.blocks)), None]
    with progress.task(PRICING, len(blocks)) as advance, background() as begin:
        for block in blocks:
            curvatures = Curvatures(folder, block, total)
            sites = [s for s in model.anatomy.sites.values() if s.block == block and s.name in curvatures]
            prices |= _price_block(model, curvatures, sites, menus, begin)
            memory.release()
            advance()
    return prices


def _price_block(
    model: StreamedModel, curvatures: Curvatures, sites: Sequence[Site], menus: Sequence[Callable[[int], list[Level]]],
    begin: Begin,
) -> dict[str, Prices]:  # fmt: skip
    """Prices of every site of one block, what siblings share computed once."""
    costs: dict[str, InputCosts] = {}
    typical = Typical.of(curvatures, sites)

    def begun(site: Site) -> Callable[[], Prices]:
        levels = sorted({x.base for menu in menus for x in menu(site.shape[1])})
        with threads_for(math.prod(site.shape)), alike():
            weight, curvature, reads = read_weight(model, site), curvatures[site.name], curvatures.reads(site.name)
            if (stand_in := typical.standing_in(site, curvature)) is not None:
                return now(lambda: _unsolved(price(weight, stand_in, levels)))
            if reads not in costs:
                costs[reads] = InputCosts.of(curvature.h, any(map(rotates, levels)))
            return begin_price(weight, curvature, levels, costs[reads], begin)

    return dict(zip((s.name for s in sites), ahead(map(begun, sites), PRICED_AHEAD), strict=True))


def _unsolved(prices: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Prices of a site that every method rounds to nearest."""
    return {level: dict.fromkeys(found, found["nearest"]) for level, found in prices.items()}


def rehearse(model: StreamedModel, folder: Path, total: int, prices: Mapping[str, Mapping[str, Mapping[str, float]]],
             menus: Mapping[str, Callable[[int], list[Level]]], widths: Sequence[int],
             progress: Progress) -> dict[str, dict[int, dict[int, float]]]:  # fmt: skip
    """Solve the first and the middle block with each method: method -> block -> bits of `widths` -> damage over price.

    menus: the levels of each method that have prices, for rows of so many weights.
    """
    kinds = base.weightwise(*menus)
    curvatures = {block: Curvatures(folder, block, total, kinds) for block in sorted({0, len(model.blocks) // 2})}
    sites = {block: _rehearsed(model, found, block) for block, found in curvatures.items()}
    with progress.task(REHEARSING, sum(map(len, sites.values()))) as advance:
        rows = {b: _rehearse(model, curvatures[b], sites[b], prices, menus, widths, advance) for b in curvatures}
    return {method: {block: row[method] for block, row in rows.items()} for method in menus}


def _rehearsed(model: StreamedModel, curvatures: Curvatures, block: int) -> list[Site]:
    """The last site of each shape."""
    known = (s for s in model.anatomy.block_sites(block) if s.name in curvatures)
    met = [s for s in known if curvatures.tokens(s.name) >= (ENOUGH_TOKENS if s.expert is not None else 1)]
    widest = REHEARSED_WIDTH * median_low([s.shape[1] for s in met] or [0])
    return list({s.shape: s for s in met if s.shape[1] <= widest}.values())


def _rehearse(
    model: StreamedModel, curvatures: Curvatures, sites: Sequence[Site],
    prices: Mapping[str, Mapping[str, Mapping[str, float]]], menus: Mapping[str, Callable[[int], list[Level]]],
    widths: Sequence[int], advance: Callable[[], None],
) -> dict[str, dict[int, float]]:  # fmt: skip
    tries = list(itertools.product(menus, widths))

    def solved(site: Site) -> list[tuple[float, float]]:
        listed, found = prices[site.name], []
        weight, curvature = _some_rows(read_weight(model, site), curvatures[site.name])
        known = {name: [x for x in menu(site.shape[1]) if x.base.name in listed] for name, menu in menus.items()}
        picked = {(name, bits): _nearest_level(known[name], bits) for name, bits in tries if known[name]}
        if len(weight) < site.shape[0]:
            listed = price(weight, curvature, sorted({level.base for level in picked.values()}))
        for name, bits in tries:
            if (level := picked.get((name, bits))) is None:
                found.append((0.0, 0.0))
                continue
            method = base.get(name)()
            packed = method.encode(weight[None], level, torch.bfloat16, statistics(method, [curvature]))[0]
            found.append((curvature.damage(packed.decode().float() - weight), listed[level.base.name][method.prices]))
        memory.release()
        advance()
        return found

    rows = side_by_side(solved, sites, max((min(s.shape[0], REHEARSED_ROWS) * s.shape[1] for s in sites), default=0))
    sums = {key: [sum(row[i][side] for row in rows) for side in (0, 1)] for i, key in enumerate(tries)}
    return {m: {b: d / p if p else 1.0 for b in widths for d, p in [sums[m, b]]} for m in menus}


def _some_rows(weight: Tensor, curvature: Curvature) -> tuple[Tensor, Curvature]:
    """At most `REHEARSED_ROWS` evenly spaced rows of a weight, and the statistics of a matrix of these alone."""
    if len(weight) <= REHEARSED_ROWS:
        return weight, curvature
    picked = torch.linspace(0, len(weight) - 1, REHEARSED_ROWS).round().long()
    g = curvature.g[picked] if curvature.g.ndim == 1 else curvature.g[picked][:, picked]
    gradient, fisher = (None if m is None else m[picked] for m in (curvature.gradient, curvature.fisher))
    return weight[picked], replace(curvature, g=g, gradient=gradient, fisher=fisher)


def statistics(method: base.Encoder, curvatures: Sequence[Curvature]) -> base.Statistics:
    """What a method needs of a batch of sites. Of embeddings and heads, diagonal moments are left out."""
    found: dict[str, Any] = {}
    for name in method.needs:
        parts: list[Tensor | None] = [getattr(c, name.lower()) for c in curvatures]
        square = [p for p in parts if p is not None and p.ndim == 2]
        found[name.lower()] = batched(square) if len(square) == len(parts) else None
    return base.Statistics(**found)


def batched(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one with a leading axis; a single one isn't copied: large matrices come alone."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _nearest_level(levels: Sequence[Level], bits: float) -> Level:
    """The level closest to a width; groups of 64 and zero points where there is a choice."""
    return min(levels, key=lambda x: (abs(x.bits - bits), abs((x.group_size or 1 << 20) - GROUP), x.symmetric))


class Probes(NamedTuple):
    """KL in nats per token of the whole model rounded to nearest.

    points: (damage, KL) at each width; spread: the KL's relative standard error over windows; first: how much more
    than the others' a nat of damage in the first block costs, by which its damage counts in `points` as well.
    """

    points: list[tuple[float, float]]
    spread: float
    first: float


def probe(
    model: StreamedModel, windows: Windows, prices: Mapping[str, Mapping[str, Mapping[str, float]]], widths: Sequence[int],
    progress: Progress,
) -> Probes:  # fmt: skip
    """Measure the model at some widths of `PROBED_BITS`, and where that is all of them at one with its first block as it is.

    Prices take inputs and gradients to be independent, also from token to token. They are least so in the first block, where
    every occurrence of a token has the same input. That matters where a plan gives blocks different levels.
    """
    candidates = {str(bits): Candidate(model, _rounded_to(bits)) for bits in widths}
    if mixed := len(widths) == len(PROBED_BITS):
        candidates[REST] = Candidate(model, _rounded_to(FIRST_BITS, start=1))
    with stored_precision(model.checkpoint):
        scores = compare(model, candidates, windows, progress, kl_only=True)
    per_window = {name: torch.cat(found.kl).double().mean(1) for name, found in scores.items()}
    kl = {name: float(found.mean()) for name, found in per_window.items()}
    sites = [s for s in model.anatomy.sites.values() if s.block is not None and s.name in prices]

    def damage(bits: int, first: bool) -> float:
        own = (s for s in sites if (s.block == 0) == first)
        return sum(prices[s.name][probed_level(s.shape[1], bits).name]["nearest"] for s in own)

    first = 1.0
    if mixed:
        first = _excess(kl[str(FIRST_BITS)] - kl[REST], damage(FIRST_BITS, True), kl[REST], damage(FIRST_BITS, False))
    points = [(damage(bits, True) * first + damage(bits, False), kl[str(bits)]) for bits in widths]
    return Probes(points, max(_relative_error(per_window[str(bits)]) for bits in widths), first)


def _excess(kl: float, damage: float, rest_kl: float, rest_damage: float) -> float:
    """KL per damage of one part of a model over that of the rest, within `FIRST_LIMITS`; 1 where there is no other part."""
    if min(damage, rest_kl, rest_damage) <= 0:
        return 1.0
    least, most = FIRST_LIMITS
    return min(max(kl / damage / (rest_kl / rest_damage), least), most)


def _relative_error(values: Tensor) -> float:
    """Standard error of the mean of independent values as a share of it; `UNKNOWN_SPREAD` for a single one."""
    if len(values) < 2:
        return UNKNOWN_SPREAD
    return float(values.std() / values.mean().clamp_min(1e-12) / len(values) ** 0.5)


def _rounded_to(bits: int, start: int = 0) -> Override:
    """The blocks from `start` on."""
    return nearest(lambda site: None if site.block is None or site.block < start else probed_level(site.shape[1], bits))


def nearest(level_of: Callable[[Site], Level | None]) -> Override:
    """Rounds every site to nearest at its level while it is loaded."""

    def override(site: Site, weight: Tensor) -> Tensor:
        level = level_of(site)
        if level is None:
            return weight
        grid = IntegerGrid(int(level.bits), level.group_size, level.symmetric)
        with threads_for(weight.numel()):
            affine = grid.fit(weight)
            return grid.decode(grid.encode(weight, affine), affine).float()

    return override


def probed_levels(columns: int, widths: Iterable[int] = PROBED_BITS) -> list[Level]:
    """The levels that `probe` rounds matrices to, which need prices."""
    return [probed_level(columns, bits) for bits in widths]


def probed_level(columns: int, bits: int) -> Level:
    """The level of `probed_levels` of one width."""
    size = next((g for g in (GROUP, 32) if columns % g == 0), None)
    return Level(bits, None if size == columns else size)
