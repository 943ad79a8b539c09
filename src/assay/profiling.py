"""Makes a profile: text, two sweeps, prices, a rehearsal and probes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from assay import engines
from assay.budget import agreement, offers, plans, probe
from assay.budget.agreement import Reference, compared
from assay.budget.size import Budget
from assay.budget.spread import spreads
from assay.engines.gguf.write import whole_bytes
from assay.measure import tokens as token_kinds
from assay.measure.footprint import footprint
from assay.measure.profile import ALL_GRADIENTS, ENOUGH_TO_SOLVE, INDEX, Gradients, Profile, measure, save_index, thinned
from assay.measure.stream import StreamedModel
from assay.measure.sums import PARTS
from assay.measure.text import Windows, load_tokenizer, tokenizer_digest, windows
from assay.methods import base
from assay.methods.menus import stand_in
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.files import read_note, save_note, unless_refused
from assay.model.level import Level
from assay.model.lock import alone
from assay.model.progress import Progress
from assay.model.threads import threads_for

TOKENS = 16_384
WINDOW = 256
PROBE_TOKENS = 4_096
POOL = 8
"""Times as much text as is used, from which a selection is made."""
HELD_OUT_SPAN = 4
REHEARSED = ("gptq", "two_sided")
Menu = Callable[[int], list[Level]]
MAX_AUTO_TOKENS = 131_072
STABLE_SHARE = 0.05


@dataclass(frozen=True)
class Selection:
    """Which windows of the text to measure on. method: of methods/select, None: the first; target: the user's own text.

    Raises InputError for an unknown method, and one that needs a target where none is given.
    """

    method: str | None = None
    target: str | Path | None = None

    def __post_init__(self) -> None:
        if self.method and "target" in base.load(self.method, "select").needs and self.target is None:
            raise InputError(f"--select {self.method} needs the text that the choice should resemble; give it with --target")


ALL_FIRST = Selection()


@dataclass(frozen=True)
class Scope:
    """What a profile is for. methods: those whose levels are priced and that are rehearsed; levels: further ones to price.

    sparing: for these methods only, so that of gradients which none of them solves with less is measured;
    flat: for one level everywhere, one of `levels`: no others are priced, and their widths alone are rehearsed and probed.
    """

    methods: Sequence[str] = REHEARSED
    levels: Sequence[Level] = ()
    sparing: bool = False
    flat: bool = False

    def menu(self, method: str) -> Menu:
        """The levels of a method that are priced, for rows of so many weights."""
        return _further(self.levels) if self.flat else base.get(method)().levels

    @property
    def menus(self) -> list[Menu]:
        """All that is priced."""
        widths = {*self.widths, agreement.BITS}
        return [*map(self.menu, self.methods), _further(self.levels), lambda columns: probe.probed_levels(columns, widths)]

    @property
    def widths(self) -> list[int]:
        """Bits at which the model is probed and methods are rehearsed.

        Where the fewest are, the next ones are too: solvers lose a fraction of what a probe at so few does.
        """
        near = {min(probe.PROBED_BITS, key=lambda bits: abs(bits - level.bits)) for level in self.levels}
        few = min(probe.PROBED_BITS)
        return [bits for bits in probe.PROBED_BITS if not self.flat or bits in near or (few in near and bits == few + 1)]

    def gradients(self, model: StreamedModel, windows: int) -> Gradients:
        """What is measured of the gradients on so many windows.

        Only prices need them where a solver takes H alone. An expert meets too few tokens to leave any out.
        """
        if not self.sparing or base.weightwise(*self.methods):
            return ALL_GRADIENTS
        every = 1 if model.anatomy.has_experts else None
        if all(base.get(name).prices != "two_sided" and not set(base.get(name).needs) - {"H"} for name in self.methods):
            return Gradients(every or (max(1, windows // PARTS) if self.flat else thinned(windows)), whole=False)
        return Gradients(every or max(1, windows // ENOUGH_TO_SOLVE))


ANY = Scope()


def make_profile(
    model: StreamedModel, folder: Path, calibration: str | Path | None, tokens: int, window: int | None, seed: int,
    progress: Progress, scope: Scope = ANY, token_weights: str = "none", selection: Selection = ALL_FIRST,
) -> Profile:  # fmt: skip
    """Measure into `folder`; continues where a call with the same settings was cut off. Raises InputError.

    token_weights: see `measure.tokens`.
    """
    token_kinds.check(token_weights)
    _check_fit(model, scope.levels)
    target = _target(model, selection, window)
    text, held_out, origin = _texts(model, calibration, tokens, window, selection, target, seed)
    weightwise, gradients = base.weightwise(*scope.methods), scope.gradients(model, len(text.ids))
    settings = _settings(model, text, seed, weightwise, token_weights)
    settings |= {"target": target.digest if target else None}
    settings |= {} if gradients == ALL_GRADIENTS else {"gradients": gradients._asdict()}
    if (existing := _existing(folder, settings, scope)) is not None:
        return existing
    with alone(folder) as fresh, unless_refused(folder, fresh):
        if (existing := _existing(folder, settings, scope)) is not None:
            return existing
        _claim(folder, settings)
        measure(model, text, folder, seed, progress, weightwise, token_weights, gradients)
        return _finish(model, folder, text, held_out, origin, target, settings, scope, progress)


def _existing(folder: Path, settings: dict[str, Any], scope: Scope) -> Profile | None:
    """The finished profile of a folder. Raises InputError for one of other settings, or without what is asked for."""
    if not (folder / INDEX).exists():
        return None
    found = Profile.open(folder)
    if found.index["settings"] != settings:
        raise InputError(f"{folder} holds a profile of other settings or another model; choose another folder")
    menu, columns = _further(scope.levels), {row["name"]: row["shape"][1] for row in found.index["rows"]}
    lacking = [m for m in scope.methods if m not in {*REHEARSED, *found.index["ratios"]}]
    lacking += [x.name for name, known in found.prices.items() for x in menu(columns[name]) if x.base.name not in known]
    if lacking:
        raise InputError(f"{folder} holds a profile without prices of {lacking[0]}; choose another folder")
    return found


def _further(levels: Sequence[Level]) -> Menu:
    """Those of the levels that a matrix of so many columns can have."""
    return lambda columns: [y for x in levels if columns % ((y := stand_in(x, columns)).group_size or 1) == 0]


def _check_fit(model: StreamedModel, levels: Sequence[Level]) -> None:
    """Raises InputError for a level that no matrix can have."""
    sites = list(model.anatomy.sites.values())
    for level in levels:
        if not any(map(_further([level]), {site.shape[1] for site in sites})):
            offers.check_groups(level, sites)


def stable_profile(
    model: StreamedModel, folder: Path, calibration: str | Path | None, window: int | None, seed: int, progress: Progress,
    scope: Scope = ANY, token_weights: str = "none", selection: Selection = ALL_FIRST,
) -> Profile:  # fmt: skip
    """Double the calibration tokens until the plan at 3.5 bits stops changing. Raises InputError.

    scope: not of one level, which leaves nothing to plan.
    """

    def on(count: int, folder: Path) -> Profile:
        return make_profile(model, folder, calibration, count, window, seed, progress, scope, token_weights, selection)

    if (folder / INDEX).exists():
        return on(int(Profile.open(folder).index["calibration"]["tokens"]), folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no profile; choose another folder")
    with alone(work := folder.with_name(f".{folder.name}.auto")):
        count, earlier = TOKENS // 4, None
        while True:
            found = on(count, work / str(count))
            plan = plans.make(found, Budget(bits=3.5), engines.get("plain"), "two_sided", (), "lagrange", False)
            picked = {name: choice.level for name, choice in plan.choices.items()}
            changed = sum(picked[n] != earlier[n] for n in picked) / len(picked) if earlier else 1.0
            used = int(found.index["calibration"]["tokens"])
            progress.log(f"{used} calibration tokens: {changed:.0%} of the plan changed")
            if changed <= STABLE_SHARE or used < 0.9 * count or 2 * count > MAX_AUTO_TOKENS:
                break
            earlier, count = picked, count * 2
        os.rename(found.folder, folder)
        shutil.rmtree(work)
    return Profile.open(folder)


def text_digest(model: StreamedModel, calibration: str | Path | None, tokens: int, window: int | None) -> str:
    """The digest that a profile of these settings will have. Raises InputError."""
    return _texts(model, calibration, tokens, window)[0].digest


def _finish(
    model: StreamedModel, folder: Path, text: Windows, held_out: Windows, origin: dict[str, Any], target: Windows | None,
    settings: dict[str, Any], scope: Scope, progress: Progress,
) -> Profile:  # fmt: skip
    prices = probe.price_model(model, folder, text.tokens, scope.menus, progress)
    menus = {name: scope.menu(name) for name in scope.methods}
    ratios = probe.rehearse(model, folder, text.tokens, prices, menus, scope.widths, progress)
    with threads_for(0):  # products with vectors, which MKL divides by threads in any case
        spread = spreads(model, folder, text.tokens)
    probes = probe.probe(model, held_out, prices, scope.widths, progress)
    kept_nbytes = model.checkpoint.kept_nbytes
    names = {n: kept_nbytes(n) for n in model.checkpoint.names}
    index = {
        "settings": settings, "model": model.checkpoint.fingerprint, "family": model.anatomy.family,
        "folder": str(model.checkpoint.folder.absolute()),
        "tokenizer": tokenizer_digest(load_tokenizer(model.checkpoint)),
        "calibration": {"source": text.source, "tokens": text.tokens, "window": text.ids.shape[1], "digest": text.digest}
        | origin,
        "held_out": held_out.ids.tolist(), "rows": [vars(r) for r in offers.rows(model, kept_nbytes)], "kept": model.anatomy.kept,
        "names": names, "footprint": footprint(model).to_json(),
        "parameters": sum(math.prod(model.checkpoint.shape(n)) for n in model.checkpoint.names),
        "file_bytes": model.checkpoint.kept_file_bytes, "gguf": _gguf(model.checkpoint),
        "prices": prices, "ratios": ratios, "probes": probes.points, "first": probes.first, "spread": spread,
        "probe_spread": probes.spread, "target": None, "flat": scope.flat,
    }  # fmt: skip
    if target is not None:
        index["target"] = compared(model, Reference.of(Profile(folder, index)), target, progress)
    return save_index(folder, index)


def _gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a GGUF file takes if every tensor stays, or why there is none."""
    try:
        file_bytes, tensor_bytes = whole_bytes(checkpoint)
    except InputError as error:
        return {"refused": str(error)}
    return {"file_bytes": file_bytes, "tensor_bytes": tensor_bytes}


def _texts(
    model: StreamedModel, calibration: str | Path | None, count: int, window: int | None, selection: Selection = ALL_FIRST,
    target: Windows | None = None, seed: int = 0,
) -> tuple[Windows, Windows, dict[str, Any]]:  # fmt: skip
    """Calibration windows, held-out ones for probes, and where the first are found in the text.

    The held-out ones come from what follows in the text, far apart: neighbours are of one document; the KL of 16 of
    them in a row differed by 8% from place to place, that of 16 spread over four times the text by half of it.
    """
    length = window_length(model, window)
    reach = (count + PROBE_TOKENS) * POOL if selection.method else count + HELD_OUT_SPAN * PROBE_TOKENS
    both = windows(model.checkpoint, calibration, "calibration", reach, length, model.vocabulary)
    pool, picked = both.tokens, []
    if selection.method:
        wanted = min(len(both.ids), (count + PROBE_TOKENS) // length)
        chosen = base.load(selection.method, "select")().select(both.ids, target.ids if target else None, wanted, seed)
        picked, both = chosen.tolist(), Windows(both.ids[chosen], both.source)
    held = min(max(1, PROBE_TOKENS // length), len(both.ids) // 4)
    if held < 1:
        raise InputError(f"{both.source}: {both.tokens} tokens; calibration needs at least {4 * length}")
    used = min(len(both.ids) - held, max(1, count // length))
    spread = torch.linspace(used, len(both.ids) - 1, held).round().long()
    text, held_out = Windows(both.ids[:used], both.source), Windows(both.ids[spread], both.source + ":held out")
    return text, held_out, {"picked": picked[:used], "pool": pool if picked else text.tokens, "select": selection.method}


def _target(model: StreamedModel, selection: Selection, window: int | None) -> Windows | None:
    """The user's own text."""
    if selection.target is None:
        return None
    wanted = max(TOKENS, agreement.TOKENS)
    return windows(model.checkpoint, selection.target, "calibration", wanted, window_length(model, window), model.vocabulary)


def window_length(model: StreamedModel, window: int | None) -> int:
    """Tokens that are read together: as many as asked for, or as the model has positions for."""
    limit = int(getattr(model.model.config, "max_position_embeddings", WINDOW) or WINDOW)
    return min(window or WINDOW, limit)


def _settings(model: StreamedModel, text: Windows, seed: int, weightwise: Sequence[str], token_weights: str) -> dict[str, Any]:
    facts = {"model": model.checkpoint.fingerprint, "digest": text.digest, "tokens": text.tokens, "seed": seed}
    return facts | {"weightwise": list(weightwise), "token_weights": token_weights}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Mark an unfinished profile with its settings, so that only the same ones continue it. Raises InputError."""
    note = folder / "unfinished.json"
    if not note.exists() and next(folder.iterdir(), None) is not None:
        raise InputError(f"{folder} exists and is no profile; choose another folder")
    if note.exists() and read_note(note, "damaged") != settings:
        raise InputError(f"{folder} holds an unfinished profile of other settings; remove it or choose another folder")
    save_note(note, settings)
