"""Evolution of a plan by measured KL: levels are encoded when a candidate first asks for them, and candidates are run.

The text is that of the profile. On its held-out windows the plan that was found must beat the one it started from.
(EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, 2024.)
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from assay.budget import planners, plans
from assay.budget.menu import Decision
from assay.budget.plan import Plan
from assay.budget.planners import lagrange
from assay.budget.planners.evolution import Choice, Parent, Stage, evolve
from assay.budget.table import Table
from assay.engines.contract import Contract
from assay.execute import encode, scale_dtype
from assay.measure.damage import Curvature
from assay.measure.precision import stored_precision
from assay.measure.profile import Profile
from assay.measure.stream import Override, StreamedModel, read_weight
from assay.measure.text import recall
from assay.methods import base
from assay.model.errors import InputError
from assay.model.files import open_tensors, read_note, save_note, save_tensors
from assay.model.level import Level
from assay.model.progress import Progress
from assay.model.sites import Site
from assay.model.terms import restore
from assay.prove.variants import mean_kl

DECODED_BYTES = 1 << 29
OFFSPRING = 128
STAGES = (Stage(24, 0.0), Stage(6, 1 / 32), Stage(1, 1 / 4), Stage(1, 1.0))
"""The first stage reads no text: it is what the prices say, so few candidates are run that have no chance."""
DEFAULT_MINUTES = 10.0


def check(planner: str, minutes: float | None, fixed: str | None) -> float | None:
    """Minutes to search for, None where nothing is searched. fixed: the option that leaves nothing to plan, if one does.

    Raises InputError for what contradicts, and for an unknown planner.
    """
    planners.get(planner)
    if fixed and planner != "lagrange":
        raise InputError(f"--planner {planner} divides a budget, and {fixed} leaves nothing to divide; give one of the two")
    if planner != "evolution":
        if minutes is not None:
            raise InputError(f"--minutes bounds the search of --planner evolution, not of {planner}; leave one out")
        return None
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"--minutes {minutes:g}: give a number of minutes above zero")
    return DEFAULT_MINUTES if minutes is None else minutes


def evolved(
    model: StreamedModel, profile: Profile, plan: Plan, contract: Contract, keep: Sequence[str], minutes: float, work: Path,
    progress: Progress,
) -> Plan:  # fmt: skip
    """The best plan within the same bytes that a search of so many minutes finds, or `plan` where nothing better shows.

    Levels outside the blocks stay. Every generation is durable in `work`: a call that was cut off goes on with what is left
    of its time. How many generations fit depends on the machine, so another run may find another plan.
    Raises InputError when the text of the profile is no longer there.
    """
    text = recall(model.checkpoint, profile.index["calibration"], model.vocabulary, "--planner evolution").ids
    held_out = torch.tensor(profile.index["held_out"])
    store = LevelStore(model, profile, plan.method, work / f"levels-{_digest(f'{profile.digest}:{plan.method}')}")

    def search(decisions: Sequence[Decision], limit: int, choice: Choice) -> tuple[Choice, float]:
        trial = Trial(model, decisions, store)
        note = work / f"evolution-{_digest(f'{profile.digest}:{plan.to_text()}:{minutes}')}.json"
        found = _search(trial, limit, choice, text, minutes, note, progress)
        before, after = trial.kl([choice, found.choice], held_out)
        measured = f"{found.generation} generations: {before:.4f} nats/token on held-out text before, {after:.4f} after"
        progress.log(f"evolution, {measured}")
        return (found.choice, after / before) if after < before else (choice, 1.0)

    return plans.changed(profile, plan, contract, keep, search)


class LevelStore:
    """Weights of sites as a method leaves them at a level: made when first asked for, then read from a folder."""

    def __init__(self, model: StreamedModel, profile: Profile, method: str, folder: Path) -> None:
        self._model, self._profile, self._name, self._folder = model, profile, method, folder
        self._method = base.get(method)()
        self._decoded: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)

    def decoded(self, site: Site, level: str) -> Tensor:
        """Weight [out, in], float32; the caller doesn't change it."""
        key = (site.name, level)
        if key not in self._decoded:
            self._decoded[key] = self._read(site, level)
            while sum(t.nbytes for t in self._decoded.values()) > DECODED_BYTES and len(self._decoded) > 1:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(key)
        return self._decoded[key]

    def _read(self, site: Site, level: str) -> Tensor:
        path = self._folder / f"{_digest(f'{site.name}:{level}')}.safetensors"
        if not path.exists():
            weight, curvature = read_weight(self._model, site), self._curvature(site)
            packed = encode(self._method, weight[None], Level.parse(level), scale_dtype(self._model, site), [curvature])[0][0]
            save_tensors(path, packed.tensors(), {"level": packed.level.name})
        with open_tensors(path) as file:
            stored = {name: tensor.clone() for name, tensor in file.items()}
            return restore(stored, Level.parse(file.metadata["level"]), scale_dtype(self._model, site)).decode().float()

    def _curvature(self, site: Site) -> Curvature:
        return self._profile.curvatures(site.block, base.weightwise(self._name))[site.name]


class Trial:
    """Runs the plans of one menu."""

    def __init__(self, model: StreamedModel, decisions: Sequence[Decision], store: LevelStore) -> None:
        self._model, self._store, self.decisions = model, store, decisions
        sites = model.anatomy.sites
        self._blocks: list[list[tuple[int, str]]] = [[] for _ in model.blocks]
        for index, decision in enumerate(decisions):
            for name in decision.sites:
                block = sites[name].block
                if block is not None:
                    self._blocks[block].append((index, name))

    @property
    def inside(self) -> list[int]:
        """Decisions that a search may change: those whose sites are in the blocks, where candidates are run."""
        return [i for i, d in enumerate(self.decisions) if d.inside and len(d.options) > 1]

    def kl(self, choices: Sequence[Choice], ids: Tensor) -> list[float]:
        """Nats per token from the original to each choice of options, on windows ids [n, length]."""
        with stored_precision(self._model.checkpoint):
            return mean_kl(self._model, ids, [self._keys(choice) for choice in choices], self._override)

    def _keys(self, choice: Choice) -> list[Hashable]:
        return [tuple((name, self.decisions[i].options[choice[i]].level) for i, name in block) for block in self._blocks]

    def _override(self, block: int, key: Hashable) -> Override:
        assert isinstance(key, tuple)
        levels: dict[str, str | None] = dict(key)

        def override(site: Site, weight: Tensor) -> Tensor:
            level = levels.get(site.name)
            return weight if level is None else self._store.decoded(site, level)

        return override


def _search(trial: Trial, limit: int, choice: Choice, text: Tensor, minutes: float, note: Path, progress: Progress) -> Parent:
    """The parent when the time is over; its state lies in `note` after every generation."""
    reduced, options, room = _reduced(trial, limit, choice)
    table = Table.of(reduced)

    def whole(part: Choice) -> Choice:
        full = list(choice)
        for index, picked, offered in zip(trial.inside, part, options, strict=True):
            full[index] = offered[picked]
        return tuple(full)

    def fitness(choices: Sequence[Choice], share: float, draw: int) -> list[float]:
        if share == 0:
            return [table.damage_of(np.array(c, dtype=np.int64)) for c in choices]
        return trial.kl([whole(part) for part in choices], _drawn(text, share, draw))

    begun = perf_counter()
    start = tuple(row.index(choice[i]) for i, row in zip(trial.inside, options, strict=True))
    state = read_note(note, "damaged") if note.exists() else None
    if state:
        parent, spent = Parent(tuple(state["choice"]), state["loss"], state["generation"]), float(state["seconds"])
    else:
        parent, spent = Parent(start, fitness([start], 1.0, 0)[0], 0), 0.0
    search, seconds = evolve(reduced, room, fitness, parent, 0, OFFSPRING, STAGES), round(60 * minutes)
    with progress.task("searching plans", seconds) as advance:
        shown = 0
        while (used := spent + perf_counter() - begun) < 60 * minutes or parent.generation == 0:
            advance(min(int(used), seconds) - shown)
            shown = min(int(used), seconds)
            parent = next(search)
            facts = {"choice": parent.choice, "loss": parent.loss, "generation": parent.generation}
            save_note(note, facts | {"seconds": spent + perf_counter() - begun})
        advance(seconds - shown)
    return Parent(whole(parent.choice), parent.loss, parent.generation)


def _reduced(trial: Trial, limit: int, choice: Choice) -> tuple[list[Decision], list[list[int]], int]:
    """(decisions inside the blocks with the options on their hulls and the chosen ones, which options, bytes for them).

    Fewer levels are encoded that way, and a step between neighbours is worth measuring.
    """
    table = Table.of(trial.decisions)
    hulls = lagrange.on_hulls(table)
    options = [sorted({*hulls[i], choice[i]}) for i in trial.inside]
    others = set(range(len(choice))) - set(trial.inside)
    room = limit - sum(trial.decisions[i].options[choice[i]].nbytes for i in others)
    reduced = [
        Decision(d.name, d.sites, d.count, True, tuple(d.options[k] for k in row))
        for d, row in zip((trial.decisions[i] for i in trial.inside), options, strict=True)
    ]
    return reduced, options, room


def _drawn(text: Tensor, share: float, draw: int) -> Tensor:
    """A share of the windows [n, length]; all of them for 1."""
    if share >= 1:
        return text
    count = max(1, round(share * len(text)))
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(draw))[:count]]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
