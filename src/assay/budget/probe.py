"""Probes: the few measurements of the running model that turn prices into promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from assay.budget.forecast import UNKNOWN_SPREAD
from assay.budget.prices import price
from assay.measure.damage import Curvature
from assay.measure.precision import stored_precision
from assay.measure.profile import Curvatures
from assay.measure.stream import Override, StreamedModel
from assay.measure.text import Windows
from assay.methods import base
from assay.methods.grid.integer import IntegerGrid
from assay.model import memory
from assay.model.level import Level
from assay.model.progress import Progress
from assay.model.sites import Site, key_of
from assay.model.threads import threads_for
from assay.prove.divergence import Candidate, compare

PROBED_BITS = (4, 3, 2)
GROUP = 64


def read_weight(model: StreamedModel, site: Site) -> Tensor:
    """Weight of a site as float32 [out, in], whatever its storage order."""
    value = model.checkpoint.read(site.name).float()
    if site.stacked and site.expert is not None and site.rows is not None:
        return value[site.expert, slice(*site.rows)]
    return value.T.contiguous() if site.transposed else value


def price_model(model: StreamedModel, folder: Path, total: int, menus: Sequence[Callable[[int], list[Level]]],
                progress: Progress) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """Prices of every site at every level of the menus, block by block."""
    prices: dict[str, dict[str, dict[str, float]]] = {}
    blocks: list[int | None] = [*range(len(model.blocks)), None]
    with progress.task("pricing levels", len(blocks)) as advance:
        for block in blocks:
            curvatures = Curvatures(folder, block, total)
            for site in (s for s in model.anatomy.sites.values() if s.block == block):
                if (curvature := curvatures.get(key_of(site))) is not None:
                    weight = read_weight(model, site)
                    columns = site.shape[1]
                    levels = {x.base for menu in menus for x in menu(columns)}
                    with threads_for(weight.numel()):
                        prices[key_of(site)] = price(weight, curvature, sorted(levels))
            memory.release()
            advance()
    return prices


def rehearse(model: StreamedModel, folder: Path, total: int, prices: Mapping[str, Mapping[str, Mapping[str, float]]],
             methods: Sequence[str], progress: Progress) -> dict[str, dict[int, float]]:  # fmt: skip
    """Solve the middle block with each method and compare with its price."""
    block = len(model.blocks) // 2
    curvatures = Curvatures(folder, block, total, base.weightwise(*methods))
    sites = [s for s in model.anatomy.block_sites(block) if key_of(s) in curvatures and curvatures[key_of(s)].tokens][:16]
    ratios: dict[str, dict[int, float]] = {}
    with progress.task("rehearsing on one block", len(methods) * len(PROBED_BITS)) as advance:
        for name in methods:
            method = base.get(name)()
            for bits in PROBED_BITS:
                priced = done = 0.0
                for site in sites:
                    levels = [x for x in method.levels(site.shape[1]) if x.base.name in prices[key_of(site)]]
                    if not levels:
                        continue
                    level, weight, curvature = _nearest_level(levels, bits), read_weight(model, site), curvatures[key_of(site)]
                    with threads_for(weight.numel()):
                        packed = method.encode(weight[None], level, torch.bfloat16, statistics(method, [curvature]))[0]
                    done += curvature.damage(packed.decode().float() - weight)
                    priced += prices[key_of(site)][level.base.name][method.prices]
                ratios.setdefault(name, {})[bits] = done / priced if priced else 1.0
                advance()
    return ratios


def statistics(method: base.Encoder, curvatures: Sequence[Curvature]) -> base.Statistics:
    """What a method needs of a batch of sites. Of embeddings and heads, diagonal moments are left out."""
    found = {}
    for name in method.needs:
        parts: list[Tensor | None] = [getattr(c, name.lower()) for c in curvatures]
        square = [p for p in parts if p is not None and p.ndim == 2]
        found[name.lower()] = torch.stack(square) if len(square) == len(parts) else None
    return base.Statistics(**found)


def _nearest_level(levels: Sequence[Level], bits: float) -> Level:
    """The level closest to a width; groups of 64 and zero points where there is a choice."""
    return min(levels, key=lambda x: (abs(x.bits - bits), abs((x.group_size or 1 << 20) - GROUP), x.symmetric))


def probe(model: StreamedModel, windows: Windows, prices: Mapping[str, Mapping[str, Mapping[str, float]]],
          progress: Progress) -> tuple[list[tuple[float, float]], float]:  # fmt: skip
    """(damage, KL) of the whole model rounded to nearest at a few widths, and the KL's relative standard error over windows."""
    candidates = {str(bits): Candidate(model, _rounded_to(bits)) for bits in PROBED_BITS}
    with stored_precision(model.checkpoint):
        scores = compare(model, candidates, windows, progress)
    points, spread = [], 0.0
    for bits in PROBED_BITS:
        blocks = [s for s in model.anatomy.sites.values() if s.block is not None and key_of(s) in prices]
        damage = sum(prices[key_of(s)][_probed(s.shape[1], bits).name]["nearest"] for s in blocks)
        per_window = torch.cat(scores[str(bits)].kl).double().mean(1)
        points.append((damage, float(per_window.mean())))
        spread = max(spread, _relative_error(per_window))
    return points, spread


def _relative_error(values: Tensor) -> float:
    """Standard error of the mean of independent values as a share of it; `UNKNOWN_SPREAD` for a single one."""
    if len(values) < 2:
        return UNKNOWN_SPREAD
    return float(values.std() / values.mean().clamp_min(1e-12) / len(values) ** 0.5)


def _rounded_to(bits: int) -> Override:
    return nearest(lambda site: _probed(site.shape[1], bits))


def nearest(level_of: Callable[[Site], Level | None]) -> Override:
    """Rounds every site to nearest at its level while it is loaded."""

    def override(site: Site, weight: Tensor) -> Tensor:
        level = level_of(site)
        if level is None:
            return weight
        grid = IntegerGrid(int(level.bits), level.group_size, level.symmetric)
        affine = grid.fit(weight)
        return grid.decode(grid.encode(weight, affine), affine).float()

    return override


def probed_levels(columns: int) -> list[Level]:
    """The levels that `probe` rounds matrices to, which need prices."""
    return [_probed(columns, bits) for bits in PROBED_BITS]


def _probed(columns: int, bits: int) -> Level:
    size = next((g for g in (GROUP, 32) if columns % g == 0), None)
    return Level(bits, None if size == columns else size)
