"""Makes a profile: text, two sweeps, prices, a rehearsal and probes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from assay import engines
from assay.budget import plans, probe
from assay.budget.size import Budget
from assay.engines.gguf.write import whole_bytes
from assay.measure import tokens as token_kinds
from assay.measure.profile import Profile, measure, save_index
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows, load_tokenizer, tokenizer_digest, windows
from assay.methods import base
from assay.methods.menus import stand_in
from assay.model.checkpoint import Checkpoint, read_json
from assay.model.errors import InputError
from assay.model.files import save_text, unless_refused
from assay.model.level import Level
from assay.model.progress import Progress

TOKENS = 16_384
WINDOW = 256
PROBE_TOKENS = 4_096
REHEARSED = ("gptq", "two_sided")
MAX_AUTO_TOKENS = 131_072
STABLE_SHARE = 0.05


def make_profile(
    model: StreamedModel, folder: Path, calibration: str | Path | None, tokens: int, window: int | None, seed: int,
    progress: Progress, methods: Sequence[str] = REHEARSED, levels: Sequence[Level] = (), token_weights: str = "none",
) -> Profile:  # fmt: skip
    """Measure into `folder`; continues where a call with the same settings was cut off. Raises InputError.

    methods: those whose levels are priced and that are rehearsed;
    levels: further ones to price; token_weights: see `measure.tokens`.
    """
    token_kinds.check(token_weights)
    text, held_out = _texts(model, calibration, tokens, window)
    weightwise = base.weightwise(*methods)
    settings = _settings(model, text, seed, weightwise, token_weights)
    if (folder / "profile.json").exists():
        existing = Profile.open(folder)
        if existing.index["settings"] != settings:
            raise InputError(f"{folder} holds a profile of other settings or another model; choose another folder")
        return existing
    with unless_refused(folder):
        _claim(folder, settings)
        measure(model, text, folder, seed, progress, weightwise, token_weights)
        return _finish(model, folder, text, held_out, settings, methods, levels, progress)


def stable_profile(
    model: StreamedModel, folder: Path, calibration: str | Path | None, window: int | None, seed: int, progress: Progress,
    methods: Sequence[str] = REHEARSED, levels: Sequence[Level] = (), token_weights: str = "none",
) -> Profile:  # fmt: skip
    """Double the calibration tokens until the plan at 3.5 bits stops changing."""
    if (folder / "profile.json").exists():
        return Profile.open(folder)
    count, earlier = TOKENS // 4, None
    while True:
        model.forget()
        part = folder.with_name(f"{folder.name}.{count}")
        found = make_profile(model, part, calibration, count, window, seed, progress, methods, levels, token_weights)
        plan = plans.make(found, Budget(bits=3.5), engines.get("plain"), "two_sided", (), "lagrange", False)
        picked = {name: choice.level for name, choice in plan.choices.items()}
        changed = sum(picked[n] != earlier[n] for n in picked) / len(picked) if earlier else 1.0
        used = int(found.index["calibration"]["tokens"])
        progress.log(f"{used} calibration tokens: {changed:.0%} of the plan changed")
        if changed <= STABLE_SHARE or used < 0.9 * count or 2 * count > MAX_AUTO_TOKENS:
            break
        earlier, count = picked, count * 2
    os.rename(found.folder, folder)
    for part in folder.parent.glob(f"{folder.name}.[0-9]*"):
        shutil.rmtree(part)
    return Profile.open(folder)


def text_digest(model: StreamedModel, calibration: str | Path | None, tokens: int, window: int | None) -> str:
    """The digest that a profile of these settings will have. Raises InputError."""
    return _texts(model, calibration, tokens, window)[0].digest


def _finish(
    model: StreamedModel, folder: Path, text: Windows, held_out: Windows, settings: dict[str, Any],
    methods: Sequence[str], levels: Sequence[Level], progress: Progress,
) -> Profile:  # fmt: skip
    menus: list[Callable[[int], list[Level]]] = [base.get(name)().levels for name in methods]
    menus.append(probe.probed_levels)
    menus.append(lambda columns: [y for x in levels if columns % ((y := stand_in(x, columns)).group_size or 1) == 0])
    prices = probe.price_model(model, folder, text.tokens, menus, progress)
    ratios = probe.rehearse(model, folder, text.tokens, prices, methods, progress)
    points = probe.probe(model, held_out, prices, progress)
    kept_nbytes = model.checkpoint.kept_nbytes
    names = {n: kept_nbytes(n) for n in model.checkpoint.names}
    index = {
        "settings": settings, "model": model.checkpoint.fingerprint, "family": model.anatomy.family,
        "tokenizer": tokenizer_digest(load_tokenizer(model.checkpoint)),
        "calibration": {"source": text.source, "tokens": text.tokens, "window": text.ids.shape[1], "digest": text.digest},
        "held_out": held_out.ids.tolist(), "rows": [vars(r) for r in plans.rows(model, kept_nbytes)], "kept": model.anatomy.kept,
        "names": names,
        "parameters": sum(math.prod(model.checkpoint.shape(n)) for n in model.checkpoint.names),
        "file_bytes": model.checkpoint.kept_file_bytes, "gguf": _gguf(model.checkpoint),
        "prices": prices, "ratios": ratios, "probes": points,
    }  # fmt: skip
    return save_index(folder, index)


def _gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a GGUF file takes if every tensor stays, or why there is none."""
    try:
        file_bytes, tensor_bytes = whole_bytes(checkpoint)
    except InputError as error:
        return {"refused": str(error)}
    return {"file_bytes": file_bytes, "tensor_bytes": tensor_bytes}


def _texts(model: StreamedModel, calibration: str | Path | None, count: int, window: int | None) -> tuple[Windows, Windows]:
    """Calibration windows, and the held-out ones for probes that follow them in the text."""
    limit = int(getattr(model.model.config, "max_position_embeddings", WINDOW) or WINDOW)
    length = min(window or WINDOW, limit)
    both = windows(model.checkpoint, calibration, "calibration", count + PROBE_TOKENS, length, model.vocabulary)
    held = min(max(1, PROBE_TOKENS // length), len(both.ids) // 4)
    if held < 1:
        raise InputError(f"{both.source}: {both.tokens} tokens; calibration needs at least {4 * length}")
    used = min(len(both.ids) - held, max(1, count // length))
    return Windows(both.ids[:used], both.source), Windows(both.ids[-held:], both.source + ":held out")


def _settings(model: StreamedModel, text: Windows, seed: int, weightwise: Sequence[str], token_weights: str) -> dict[str, Any]:
    facts = {"model": model.checkpoint.fingerprint, "digest": text.digest, "tokens": text.tokens, "seed": seed}
    return facts | {"weightwise": list(weightwise), "token_weights": token_weights}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Mark an unfinished profile with its settings, so that only the same ones continue it. Raises InputError."""
    note = folder / "unfinished.json"
    if folder.exists() and not note.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise InputError(f"{folder} exists and is no profile; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and read_json(note, "damaged") != settings:
        raise InputError(f"{folder} holds an unfinished profile of other settings; remove it or choose another folder")
    save_text(note, json.dumps(settings, sort_keys=True))
