"""Carries a plan out, block by block; every finished block is durable and a second call continues."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.budget.plan import Plan
from assay.budget.probe import batched, statistics
from assay.measure.curvatures import Curvatures
from assay.measure.damage import Curvature
from assay.measure.experts import ENOUGH_TOKENS, reason, starved
from assay.measure.pair import Met, Pair
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel, read_weight
from assay.measure.text import recall
from assay.methods import base
from assay.methods.solve.curvature import dampings, most
from assay.methods.solve.target import compensated
from assay.model import memory
from assay.model.alike import alike
from assay.model.files import open_tensors, save_tensors
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.progress import COMPRESSING, Progress
from assay.model.sites import Site
from assay.model.terms import restore
from assay.model.threads import WORTH_SHARING, in_turn, meanwhile, side_by_side

BATCH_WEIGHTS = 1 << 25
Part = tuple[dict[str, Tensor], list["Solved"]]


@dataclass(frozen=True)
class Solved:
    """What became of one site: its level, its method, why that had to do without statistics, and of how many tokens these are.

    damping: what was added to the diagonals of its second moments before they were factored, the most of it, as a fraction of
    their mean; 0 where none was factored.
    """

    site: str
    level: str
    method: str
    damage: float
    dtype: str
    fell_back: str = ""
    tokens: int = 0
    damping: float = 0.0

    @property
    def scale_dtype(self) -> torch.dtype:
        """What its scales are stored in, by the name that `dtype` is."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


class Results:
    """The finished blocks in a folder, by source tensor.

    plain: tensors that were changed but not compressed; sequential: see `execute`; polish: what tuning the whole model
    did, for the recipe.
    """

    plain: Mapping[str, Tensor] = MappingProxyType({})
    polish: Mapping[str, Any] | None = None

    def __init__(self, folder: Path, blocks: Sequence[int | None], sequential: bool = False) -> None:
        self.sequential = sequential
        self.files = {block: folder / f"{_name(block)}.safetensors" for block in blocks}
        self.solved: dict[str, Solved] = {}
        self._home: dict[str, Path] = {}
        for path in self.files.values():
            with open_tensors(path) as file:
                for row in json.loads(file.metadata["solved"]):
                    self.solved[row["site"]] = Solved(**row)
                    self._home[row["site"]] = path

    def loaders(self) -> dict[str, Callable[[], Packed]]:
        """For each compressed tensor, a function that reads it."""
        return {site: partial(self.packed, site) for site in self.solved}

    def packed(self, site: str) -> Packed:
        """One compressed weight."""
        with open_tensors(self._home[site]) as file:
            return _packed({n: file[n].clone() for n in file if n.startswith(site + "|")}, self.solved[site])

    def decoded(self, site: Site, weight: Tensor) -> Tensor:
        """The weight [out, in], float32, that a site has now: an `Override`."""
        return self.packed(site.name).decode().float() if site.name in self.solved else weight


def execute(
    model: StreamedModel, plan: Plan, profile: Profile, folder: Path, progress: Progress, sequential: bool = False
) -> Results:
    """Solve every planned site into `folder`.

    sequential: in the order in which the model runs, each for the inputs that the part before it, already compressed,
    gives it, and with a target that makes up for how these differ from the original's. Needs the profile's text:
    raises InputError where that is no longer there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks: list[int | None] = [None, *range(len(model.blocks))]
    files = {block: folder / f"{_name(block)}.safetensors" for block in blocks}
    if not all(path.exists() for path in files.values()):
        pair = _pair(model, profile, folder) if sequential else None
        due = {block: target for block, target in files.items() if sequential or not target.exists()}

        def solve(block: int | None) -> dict[str, Any] | None:
            if due[block].exists():
                return None
            started = perf_counter()
            tensors, solved = _solve_block(model, plan, profile, block, pair)
            metadata = {"solved": json.dumps([s.__dict__ for s in solved])}
            save_tensors(due[block], tensors or {"empty": torch.zeros(1)}, metadata)
            return _figures(model, plan, solved) | {"seconds": perf_counter() - started, "memory": memory.resident()}

        outside, inside = [b for b in due if b is None], [b for b in due if b is not None]
        done = chain(map(solve, outside), in_turn(solve, inside, together=model.small and pair is None))
        with progress.task(COMPRESSING, len(due)) as advance:
            for block, figures in zip(due, done, strict=True):
                if figures is not None:
                    progress.log(_line(_name(block), figures), block=block, **figures)
                    memory.release()
                if pair is not None:
                    pair.pass_by(block, Results(folder, [block]).decoded)
                advance()
        if pair is not None:
            pair.close()
    return Results(folder, blocks, sequential)


def _pair(model: StreamedModel, profile: Profile, folder: Path) -> Pair:
    text = recall(model.checkpoint, profile.index["calibration"], model.vocabulary, "--sequential")
    return Pair(model, text.ids, folder / "pair", profile.index["settings"]["token_weights"])


def _solve_block(model: StreamedModel, plan: Plan, profile: Profile, block: int | None, pair: Pair | None) -> Part:
    sites = [s for s in model.anatomy.sites.values() if s.block == block and _planned(plan, s)]
    task = _Task(model, plan, base.get(plan.method)(), profile.curvatures(block, base.weightwise(plan.method)))
    if pair is None or block is None:
        return task.solve(sites)
    tensors: dict[str, Tensor] = {}
    solved: dict[str, Solved] = {}
    decoded: dict[str, Tensor] = {}

    def changed(site: Site, weight: Tensor) -> Tensor:
        name = site.name
        if name in solved and name not in decoded:
            decoded[name] = _packed(tensors, solved[name]).decode().float()
        return decoded.get(name, weight)

    for reads in [*pair.original(block), None]:
        due = [s for s in sites if s.reads == reads or (reads is None and s.name not in solved)]
        if due:
            new, done = task.solve(due, pair.met(block, reads, changed) if reads else None)
            tensors |= new
            solved |= {s.site: s for s in done}
    return tensors, list(solved.values())


def _planned(plan: Plan, site: Site) -> bool:
    choice = plan.choices.get(site.name)
    return choice is not None and choice.level is not None


class _Known(NamedTuple):
    """Curvatures of a batch: as measured, as the inputs are met by now (met: how), and what the method has begun of these."""

    stats: list[Curvature]
    used: list[Curvature]
    met: Met | None = None
    begun: base.Statistics | None = None


@dataclass(frozen=True)
class _Task:
    """Solving sites of one block."""

    model: StreamedModel
    plan: Plan
    method: base.Encoder
    curvatures: Curvatures

    def solve(self, sites: Sequence[Site], met: Met | None = None) -> Part:
        """Each site's tensors and what became of it. met: what these sites, that read one input, meet by now."""
        batches = list(_batches(self.plan, sites, self._starved))
        largest = max((batch[0].count for _, batch in batches), default=0)
        if isinstance(self.method, base.EarlyEncoder) and largest >= WORTH_SHARING:
            parts = self._early(self.method, batches, met)
        else:
            parts = side_by_side(lambda batch: self._batch(*batch, self._known(batch[1], met)), batches, largest)
        return {k: t for tensors, _ in parts for k, t in tensors.items()}, [s for _, solved in parts for s in solved]

    def _early(self, method: base.EarlyEncoder, batches: Sequence[tuple[Level, list[Site]]], met: Met | None) -> list[Part]:
        """One batch after another, the smallest first; the next is begun when one leaves threads idle."""
        batches = sorted(batches, key=lambda batch: batch[1][0].count)
        upcoming = (self._known(sites, met, method) for _, sites in batches)
        begun, parts = deque(islice(upcoming, 1)), []
        for batch in batches:
            with alike(), meanwhile(lambda: begun.extend(islice(upcoming, 1))):
                parts.append(self._batch(*batch, begun.popleft()))
        return parts

    def _starved(self, site: Site) -> bool:
        return site.expert is not None and self.curvatures.tokens(site.name) < ENOUGH_TOKENS

    def _known(self, sites: list[Site], met: Met | None, early: base.EarlyEncoder | None = None) -> _Known:
        stats = [self.curvatures[s.name] for s in sites]
        if any(map(starved, stats)):
            return _Known(stats, stats)
        used = stats if met is None else [replace(curvature, h=met.h) for curvature in stats]
        return _Known(stats, used, met, early.begin(statistics(early, used)) if early else None)

    def _batch(self, level: Level, sites: list[Site], known: _Known) -> Part:
        weights, (stats, used, met, begun) = [read_weight(self.model, s) for s in sites], known
        targets = weights if met is None else [compensated(weight, met.h, met.cross) for weight in weights]
        dtype = scale_dtype(self.model, sites[0])
        with dampings() as factored:
            packed, failure = encode(self.method, batched(targets), level, dtype, used, begun)
        added = most([] if failure else factored, len(sites))
        tensors: dict[str, Tensor] = {}
        solved: list[Solved] = []
        for site, weight, result, curvature, damping in zip(sites, weights, packed, stats, added, strict=True):
            damage = curvature.damage(result.decode().float() - weight)
            stored = str(dtype).removeprefix("torch.")
            why = reason(curvature) if failure and starved(curvature) else failure
            done = Solved(site.name, result.level.name, self.plan.method, damage, stored, why, curvature.tokens, damping)
            solved.append(done)
            tensors |= {f"{site.name}|{suffix}": t for suffix, t in result.tensors().items()}
        return tensors, solved


def _packed(tensors: Mapping[str, Tensor], solved: Solved) -> Packed:
    """A solved weight from the tensors of a block."""
    stored = {n.rpartition("|")[2]: t for n, t in tensors.items() if n.startswith(solved.site + "|")}
    return restore(stored, Level.parse(solved.level), solved.scale_dtype)


def encode(
    method: base.Encoder, weights: Tensor, level: Level, dtype: torch.dtype, stats: list[Curvature],
    begun: base.Statistics | None = None,
) -> tuple[list[Packed], str]:  # fmt: skip
    """The method's result; where its statistics are of no use, what it makes without them and the reason why.

    begun: what `EarlyEncoder.begin` made of `statistics`.
    """
    if "H" in method.needs and any(map(starved, stats)):
        return method.encode(weights, level, dtype, base.Statistics()), reason(stats[0])
    try:
        return method.encode(weights, level, dtype, begun or statistics(method, stats)), ""
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        return method.encode(weights, level, dtype, base.Statistics()), str(error).splitlines()[0]


def _batches(plan: Plan, sites: Iterable[Site], starving: Callable[[Site], bool]) -> Iterator[tuple[Level, list[Site]]]:
    """Planned sites that have one shape and level, in batches of bounded size; those that starve apart from the others."""
    alike: dict[tuple[str, tuple[int, int], bool, bool], list[Site]] = {}
    for site in sites:
        level = str(plan.choices[site.name].level)
        alike.setdefault((level, site.shape, site.role == "head", starving(site)), []).append(site)
    for (level, shape, _, _), same in alike.items():
        size = max(1, BATCH_WEIGHTS // max(shape[0] * shape[1], shape[0] ** 2, shape[1] ** 2))
        for start in range(0, len(same), size):
            yield Level.parse(level), same[start : start + size]


def scale_dtype(model: StreamedModel, site: Site) -> torch.dtype:
    """In which a site's scales are stored: its source's."""
    return model.checkpoint.dtype(site.name)


def _figures(model: StreamedModel, plan: Plan, solved: list[Solved]) -> dict[str, Any]:
    """What is told of a block: bits of what was compressed, loss in nats per token, fewest and most tokens, damping."""
    if not solved:
        return {}
    nbytes = sum(plan.choices[s.site].nbytes for s in solved)
    weights = sum(model.anatomy.sites[s.site].count for s in solved)
    tokens = [s.tokens for s in solved]
    return {
        "bits": 8 * nbytes / weights, "levels": sorted({s.level for s in solved}), "loss": sum(s.damage for s in solved),
        "tokens": [min(tokens), max(tokens)], "damping": max(s.damping for s in solved),
        "fell_back": sum(bool(s.fell_back) for s in solved),
    }  # fmt: skip


def _line(name: str, figures: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    took = f"{figures['seconds']:.1f} s, {figures['memory'] / 1e9:.2f} GB"
    if "bits" not in figures:
        return f"{name}: nothing planned, {took}"
    levels = figures["levels"]
    bits = f"{figures['bits']:.2f} bits ({levels[0] if len(levels) == 1 else f'{len(levels)} levels'})"
    samples = " to ".join(f"{n:,}" for n in sorted(set(figures["tokens"])))
    damping = f", damping {figures['damping']:.2g}" if figures["damping"] else ""
    tail = f", {figures['fell_back']} fell back" if figures["fell_back"] else ""
    return f"{name}: {bits}, loss {figures['loss']:.5f}, {samples} tokens{damping}{tail}, {took}"


def _name(block: int | None) -> str:
    return "outside" if block is None else f"block-{block:04d}"
