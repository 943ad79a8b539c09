"""Carries a plan out, block by block; every finished block is durable and a second call continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from assay.budget.plan import Plan
from assay.budget.probe import statistics
from assay.measure.damage import Curvature
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel, read_weight
from assay.methods import base
from assay.model import memory
from assay.model.files import save_tensors
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.progress import Progress
from assay.model.sites import Site, key_of
from assay.model.terms import restore
from assay.model.threads import side_by_side

BATCH_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class Solved:
    """What became of one site: its level, its method, and why that had to do without statistics."""

    site: str
    level: str
    method: str
    damage: float
    dtype: str
    fell_back: str = ""


class Results:
    """The finished blocks in a folder, by source tensor.

    plain: tensors that were changed but not compressed; polish: what tuning the whole model did, for the recipe.
    """

    plain: Mapping[str, Tensor] = MappingProxyType({})
    polish: Mapping[str, Any] | None = None

    def __init__(self, folder: Path, blocks: list[int | None]) -> None:
        self.files = {block: folder / f"{_name(block)}.safetensors" for block in blocks}
        self.solved: dict[str, Solved] = {}
        self._home: dict[str, Path] = {}
        for path in self.files.values():
            with safe_open(path, framework="pt") as file:
                for row in json.loads(file.metadata()["solved"]):
                    self.solved[row["site"]] = Solved(**row)
                    self._home[row["site"]] = path

    def loaders(self) -> dict[str, Callable[[], Packed]]:
        """For each compressed tensor, a function that reads it."""
        return {site: partial(self.packed, site) for site in self.solved}

    def packed(self, site: str) -> Packed:
        """One compressed weight."""
        with safe_open(self._home[site], framework="pt") as file:
            names = [n for n in file.keys() if n.startswith(site + "|")]  # noqa: SIM118
            stored = {n.rpartition("|")[2]: file.get_tensor(n).clone() for n in names}
        solved = self.solved[site]
        return restore(stored, Level.parse(solved.level), getattr(torch, solved.dtype))


def execute(model: StreamedModel, plan: Plan, profile: Profile, folder: Path, progress: Progress) -> Results:
    """Solve every planned site into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    method = base.get(plan.method)()
    blocks: list[int | None] = [*range(len(model.blocks)), None]
    with progress.task("compressing, block by block", len(blocks)) as advance:
        for block in blocks:
            target = folder / f"{_name(block)}.safetensors"
            if not target.exists():
                started = perf_counter()
                tensors, solved = _solve_block(model, plan, profile, block, method)
                metadata = {"solved": json.dumps([s.__dict__ for s in solved])}
                save_tensors(target, tensors or {"empty": torch.zeros(1)}, metadata)
                progress.log(_line(block, solved, perf_counter() - started))
                memory.release()
            advance()
    return Results(folder, blocks)


def _solve_block(
    model: StreamedModel, plan: Plan, profile: Profile, block: int | None, method: base.Encoder
) -> tuple[dict[str, Tensor], list[Solved]]:
    curvatures = profile.curvatures(block, base.weightwise(plan.method))

    def solve(batch: tuple[Level, list[Site]]) -> tuple[dict[str, Tensor], list[Solved]]:
        level, sites = batch
        weights, stats = [read_weight(model, site) for site in sites], [curvatures[key_of(site)] for site in sites]
        dtype = scale_dtype(model, sites[0])
        packed, reason = encode(method, torch.stack(weights), level, dtype, stats)
        tensors: dict[str, Tensor] = {}
        solved: list[Solved] = []
        for site, weight, result, curvature in zip(sites, weights, packed, stats, strict=True):
            damage = curvature.damage(result.decode().float() - weight)
            stored = str(dtype).removeprefix("torch.")
            solved.append(Solved(key_of(site), result.level.name, plan.method, damage, stored, reason))
            tensors |= {f"{key_of(site)}|{suffix}": t for suffix, t in result.tensors().items()}
        return tensors, solved

    batches = list(_batches(model, plan, block))
    parts = side_by_side(solve, batches, max((sites[0].count for _, sites in batches), default=0))
    return {k: t for tensors, _ in parts for k, t in tensors.items()}, [s for _, solved in parts for s in solved]


def encode(
    method: base.Encoder, weights: Tensor, level: Level, dtype: torch.dtype, stats: list[Curvature]
) -> tuple[list[Packed], str]:
    """The method's result; where its statistics are of no use, what it makes without them and the reason why."""
    if "H" in method.needs and not all(s.tokens for s in stats):
        return method.encode(weights, level, dtype, base.Statistics()), "no calibration token met it"
    try:
        return method.encode(weights, level, dtype, statistics(method, stats)), ""
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        return method.encode(weights, level, dtype, base.Statistics()), str(error).splitlines()[0]


def _batches(model: StreamedModel, plan: Plan, block: int | None) -> Iterator[tuple[Level, list[Site]]]:
    """Planned sites of a block that have one shape and level, in batches of bounded size."""
    alike: dict[tuple[Level, tuple[int, int], bool], list[Site]] = {}
    for site in model.anatomy.sites.values():
        choice = plan.choices.get(key_of(site))
        if site.block == block and choice is not None and choice.level is not None:
            alike.setdefault((Level.parse(choice.level), site.shape, site.role == "head"), []).append(site)
    for (level, shape, _), sites in alike.items():
        size = max(1, BATCH_WEIGHTS // max(shape[0] * shape[1], shape[0] ** 2, shape[1] ** 2))
        for start in range(0, len(sites), size):
            yield level, sites[start : start + size]


def scale_dtype(model: StreamedModel, site: Site) -> torch.dtype:
    """In which a site's scales are stored: its source's."""
    return model.checkpoint.dtype(site.name)


def _line(block: int | None, solved: list[Solved], seconds: float) -> str:
    bits: Mapping[str, int] = {}
    for s in solved:
        bits = {**bits, s.level: bits.get(s.level, 0) + 1}
    levels = ", ".join(f"{n} x {level}" for level, n in sorted(bits.items())) or "nothing planned"
    fallen = sum(bool(s.fell_back) for s in solved)
    tail = f", {fallen} fell back" if fallen else ""
    return f"{_name(block)}: {levels}; damage {sum(s.damage for s in solved):.5f} nats/token{tail}; {seconds:.1f} s"


def _name(block: int | None) -> str:
    return "outside" if block is None else f"block-{block:04d}"
