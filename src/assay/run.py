"""The job: open a checkpoint, measure it, plan a budget, carry the plan out, prove it, hand it over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import assay.engines.load
from assay import engines
from assay.budget import plans, probe
from assay.budget.plan import Plan
from assay.budget.size import Budget
from assay.engines import reopen, write
from assay.execute import Results, execute
from assay.measure.profile import Profile, key_of, measure, save_index
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows, load_tokenizer, tokenizer_digest, windows
from assay.methods import base
from assay.model.checkpoint import Checkpoint, read_json
from assay.model.errors import InputError, ShortfallError
from assay.model.files import save_json, save_text
from assay.model.ledger import Entry, Fate, Ledger
from assay.model.level import Level
from assay.model.progress import Progress, Silent
from assay.model.sites import Site
from assay.prove.divergence import Candidate, compare

TOKENS = 16_384
WINDOW = 256
PROBE_TOKENS = 4_096
JUDGE_TOKENS = 30_720
FALL_BACK_SHARE = 0.05
PROBED = ("gptq", "two_sided")
MAX_AUTO_TOKENS = 131_072


def job(model: str, out: str, *, against: str | None = None, **budget: Any) -> dict[str, Any]:
    """From a checkpoint to a smaller one that loads, with its price told before and after."""
    measured = profile(model, f"{out}.profile")
    planned = plan(measured.folder, **budget)
    done = compress(model, out, plan=planned, profile=measured.folder)
    return done | {"verdict": verify(out, against or model)}


def builtin_model() -> Path:
    """Folder of the model that assay ships."""
    return Path(__file__).parent / "builtin" / "model"


def open_model(model: str | Path) -> Checkpoint:
    """A checkpoint from a folder, a hub id, or "builtin"."""
    return Checkpoint.open(builtin_model() if str(model) == "builtin" else model)


def inspect(model: str | Path) -> dict[str, Any]:
    """What is in a model: blocks, sites, parameters, bytes, ties, and what stays untouched and why."""
    checkpoint = open_model(model)
    streamed = StreamedModel(checkpoint)
    anatomy = streamed.anatomy
    rows: list[dict[str, Any]] = [
        {"site": r.name, "role": r.role, "block": r.block, "shape": list(r.shape), "bytes": r.stored_bytes}
        for r in plans.rows(streamed)
    ]
    inside = [r for r in rows if r["block"] is not None]
    return {
        "model": str(checkpoint.folder), "family": anatomy.family, "blocks": len(anatomy.block_names),
        "parameters": sum(_count(checkpoint.shape(n)) for n in checkpoint.names),
        "bytes": checkpoint.weight_bytes, "tied": anatomy.tied, "sites": rows, "kept": anatomy.kept,
        "inside": {"sites": len(inside), "parameters": sum(_count(r["shape"]) for r in inside)},
    }  # fmt: skip


def profile(
    model: str | Path, out: str | Path, *, calibration: str | Path | None = None, tokens: int | str | None = None,
    window: int | None = None, seed: int = 0, progress: Progress | None = None,
) -> Profile:  # fmt: skip
    """Measure a model into a folder. Continues where an earlier call with the same settings was cut off."""
    progress = progress or Silent()
    checkpoint = open_model(model)
    streamed = StreamedModel(checkpoint)
    folder = Path(out)
    if tokens == "auto":
        return _auto_profile(streamed, folder, calibration, window, seed, progress)
    count = int(tokens or TOKENS)
    text, held_out = _texts(streamed, calibration, count, window)
    settings = _settings(streamed, text, seed)
    if (folder / "profile.json").exists():
        existing = Profile.open(folder)
        if existing.index["settings"] != settings:
            raise InputError(f"{folder} holds a profile of other settings or another model; choose another folder")
        return existing
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, settings)
    measure(streamed, text, folder, seed, progress)
    return _finish(streamed, folder, text, held_out, settings, progress)


def plan(
    source: str | Path, *, size: str | int | None = None, bits: float | None = None, max_loss: float | None = None,
    engine: str = "transformers", method: str = "auto", keep: Sequence[str] = (), planner: str = "lagrange",
    uniform: bool = False,
) -> Plan:  # fmt: skip
    """Spend a budget on a profile; needs the profile only. Raises InputError for impossible budgets."""
    measured = Profile.open(source)
    budget = Budget(size=size, bits=bits, max_loss=max_loss)
    return plans.make(measured, budget, engines.get(engine), _method(method), keep, planner, uniform)


def compress(
    model: str | Path, out: str | Path, *, plan: str | Path | Plan | None = None, profile: str | Path | None = None,
    size: str | int | None = None, bits: float | None = None, max_loss: float | None = None, method: str = "auto",
    calibration: str | Path | None = None, tokens: int | str | None = None, window: int | None = None,
    engine: str = "transformers", keep: Sequence[str] = (), uniform: bool = False, threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compress a model into the new folder `out`; runs the steps that were not done before.

    Everything unfinished lies in `.NAME.assay` beside `out`; the same call continues from there.
    """
    started, progress = perf_counter(), progress or Silent()
    if threads:
        torch.set_num_threads(threads)
    destination = Path(out)
    _check_destination(destination)
    checkpoint = open_model(model)
    work = destination.absolute().parent / f".{destination.name}.assay"
    if plan is None:
        Budget(size=size, bits=bits, max_loss=max_loss)
    _method(method)
    contract = engines.get(engine)
    streamed = StreamedModel(checkpoint)
    measured = Profile.open(profile) if profile else _profile_in(work, model, calibration, tokens, window, progress)
    _check_profile(measured, streamed)
    if plan is None:
        chosen = plans.make(measured, Budget(size=size, bits=bits, max_loss=max_loss), contract, _method(method), keep, "lagrange", uniform)
    else:
        chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
        contract = engines.get(chosen.engine)
        if chosen.model != checkpoint.fingerprint:
            raise InputError("the plan was made for another model; run assay plan on a profile of this one")
        chosen = plans.checked(measured, chosen, contract)
    twin = plans.uniform_twin(measured, chosen, contract, keep) if plan is None else None
    chosen, results = _solve_better(streamed, measured, chosen, twin, work, progress)
    report = _hand_over(streamed, chosen, measured, contract, results, destination)
    shutil.rmtree(work, ignore_errors=True)
    counts = report["ledger"]
    if counts["fell_back"] > FALL_BACK_SHARE * max(counts["planned"], 1):
        raise ShortfallError(f"{out}: {counts['fell_back']} of {counts['planned']} tensors fell back; see assay/ledger.json")
    return report | {"seconds": perf_counter() - started, "peak_rss_bytes": _peak_rss()}


def verify(
    out: str | Path, against: str | Path, *, text: str | Path | None = None, tokens: int | None = None,
    window: int | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a result against its original on text that calibration never saw."""
    progress = progress or Silent()
    result, original = open_model(out), StreamedModel(open_model(against))
    recipe = _recipe(result.folder)
    if recipe and recipe["model"] != original.checkpoint.fingerprint:
        raise InputError(f"{out} was made from another model than {against}")
    if text is not None and recipe and recipe["calibration"]["digest"] == _file_digest(text):
        raise InputError(f"{text} is what {out} was calibrated on; judge it on other text")
    length = window or int((recipe or {}).get("calibration", {}).get("window", WINDOW))
    judge = windows(original.checkpoint, text, "evaluation", tokens or JUDGE_TOKENS, length, original.vocabulary)
    scores = compare(original, {"out": Candidate(StreamedModel(result))}, judge, progress)["out"].summary()
    predicted = (recipe or {}).get("predicted", {})
    kl = dict(scores.pop("kl")) | {  # type: ignore[arg-type]
        "predicted": predicted.get("kl"), "predicted_low": predicted.get("low"), "predicted_high": predicted.get("high"),
    }  # fmt: skip
    limit = predicted.get("max_loss")
    verdict = {
        "bytes": result.weight_bytes, "bits": (recipe or {}).get("bits"), "bits_all": (recipe or {}).get("bits_all"),
        "kl": kl, **scores, "text": judge.source, "tokens": judge.tokens, "max_loss": limit,
        "passed": limit is None or kl["measured"] <= limit,
    }  # fmt: skip
    save_json(result.folder / "assay" / "verdict.json", verdict) if recipe else None
    return verdict


def export(out: str | Path, to: str, destination: str | Path) -> dict[str, Any]:
    """Write a result in another layout: plain (decoded) or compressed-tensors."""
    _check_destination(Path(destination))
    assay.engines.load.export(Path(out), to, Path(destination))
    return {"out": str(destination), "to": to, "bytes": Checkpoint.open(destination).weight_bytes}


def load(out: str | Path) -> Any:
    """A transformers model of a result."""
    return assay.engines.load.load(Path(out))


def list_methods() -> list[dict[str, Any]]:
    """Every method with its facts."""
    found = [(name, base.get(name)) for name in base.names()]
    return [
        {"name": n, "verb": m.verb, "paper": m.paper, "needs": list(m.needs), "levels": "int2..int8, groups 32/64/128/channel",
         "summary": (m.__doc__ or "").splitlines()[0]}
        for n, m in found
    ]  # fmt: skip


def _solve_better(
    model: StreamedModel, profile: Profile, plan: Plan, twin: Plan | None, work: Path, progress: Progress
) -> tuple[Plan, Results]:
    """Carry out the plan and its uniform twin; the twin's measured loss corrects the promise, the better one stays."""
    if twin is None:
        progress.log(plan.sentence)
        return plan, execute(model, plan, profile, _blocks(work, plan), progress)
    held_out = _probe_windows(model, profile)
    flat = execute(model, twin, profile, _blocks(work, twin), progress)
    flat_kl = _mean_kl(model, flat, held_out, progress)
    plan = plans.corrected(profile, plan, twin, flat_kl)
    progress.log(plan.sentence)
    results = execute(model, plan, profile, _blocks(work, plan), progress)
    kl = _mean_kl(model, results, held_out, progress)
    progress.log(f"on held-out calibration text: {kl:.4f} nats/token, uniform {twin.uniform['level']} {flat_kl:.4f}")
    if kl <= flat_kl:
        return plan, results
    sentence = f"{twin.sentence}; the uniform plan measured better ({flat_kl:.4f} against {kl:.4f}) and is used"
    return dataclasses.replace(plans.corrected(profile, twin, twin, flat_kl), sentence=sentence), flat


def _blocks(work: Path, plan: Plan) -> Path:
    levels = json.dumps({n: c.level for n, c in plan.choices.items()}, sort_keys=True)
    return work / f"blocks-{_digest(f'{plan.model}:{plan.profile}:{plan.method}:{levels}')}"


def _mean_kl(model: StreamedModel, results: Results, windows: Windows, progress: Progress) -> float:
    def override(site: Site, weight: torch.Tensor) -> torch.Tensor:
        return results.packed(key_of(site)).decode().float() if key_of(site) in results.solved else weight

    scores = compare(model, {"plan": Candidate(model, override)}, windows, progress)["plan"]
    return float(torch.cat(scores.kl).double().mean())


def _hand_over(
    model: StreamedModel, plan: Plan, profile: Profile, contract: Any, results: Results, destination: Path
) -> dict[str, Any]:
    """Write the folder, reopen it with another reader, and close the ledger."""
    loaders = results.loaders()
    ledger = _ledger(model, plan, results, contract)
    recipe = {
        "model": model.checkpoint.fingerprint, "calibration": dict(profile.index["calibration"]),
        "predicted": {"kl": plan.predicted, "low": plan.predicted_low, "high": plan.predicted_high,
                      "max_loss": plan.budget.get("max_loss")},
        "bits": plan.bits, "bits_all": plan.bits_all, "method": plan.method, "engine": plan.engine, "seed": profile.index["settings"]["seed"],
        "damage": {s.site: s.damage for s in results.solved.values()},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }  # fmt: skip
    extra = {
        "assay/plan.yaml": plan.to_text(), "assay/recipe.json": json.dumps(recipe, indent=1, sort_keys=True) + "\n",
        "assay/ledger.json": json.dumps(ledger.to_json(), indent=1) + "\n",
    }  # fmt: skip
    levels = {name: Level.parse(s.level) for name, s in results.solved.items()}
    turned = frozenset(s.name for s in model.anatomy.sites.values() if s.transposed)
    write.write(destination, model.checkpoint, loaders, contract, extra, levels, turned)
    try:
        reopen.compare(destination, model.checkpoint, loaders, contract, turned)
    except ShortfallError:
        shutil.rmtree(destination)
        raise
    written = Checkpoint.open(destination)
    stored = sum(info.nbytes for info in written.stored.values())
    if contract.layout != "plain" and stored != ledger.nbytes:
        raise ShortfallError(f"{destination}: the ledger counts {ledger.nbytes} bytes, the files hold {stored}")
    return {
        "out": str(destination), "bytes": written.weight_bytes, "bits": plan.bits, "bits_all": plan.bits_all,
        "predicted": plan.predicted, "predicted_low": plan.predicted_low, "predicted_high": plan.predicted_high,
        "source_bytes": model.checkpoint.weight_bytes, "ledger": ledger.counts(), "sentence": plan.sentence,
    }  # fmt: skip


def _ledger(model: StreamedModel, plan: Plan, results: Results, contract: Any) -> Ledger:
    ledger = Ledger()
    checkpoint, sites = model.checkpoint, model.anatomy.sites
    for name in checkpoint.names:
        before = checkpoint.nbytes(name)
        if name in results.solved:
            solved = results.solved[name]
            after = results.packed(name).nbytes if contract.layout != "plain" else before
            fate: Fate = "fell_back" if solved.fell_back else "done"
            ledger.add(Entry(name, plan.choices[name].level, fate, solved.fell_back or solved.method, before, after))
        else:
            reason = model.anatomy.kept.get(name) or (plan.choices[name].why if name in plan.choices else "")
            planned = plan.choices[name].level if name in plan.choices else None
            reason = reason or contract_reason(contract, sites.get(name))
            ledger.add(Entry(name, planned, "copied", reason, before, before))
    return ledger


def contract_reason(contract: Any, site: Any) -> str:
    """Why an engine keeps a site as it is."""
    if site is None:
        return "part of a tensor that stays whole"
    found = plans.allowed(contract, site)
    return found if isinstance(found, str) else "kept by the plan"


def _finish(
    model: StreamedModel, folder: Path, text: Windows, held_out: Windows, settings: dict[str, Any], progress: Progress
) -> Profile:
    prices = probe.price_model(model, folder, text.tokens, progress)
    ratios = probe.rehearse(model, folder, text.tokens, prices, PROBED, progress)
    points = probe.probe(model, held_out, prices, progress)
    index = {
        "settings": settings, "model": model.checkpoint.fingerprint, "family": model.anatomy.family,
        "tokenizer": tokenizer_digest(load_tokenizer(model.checkpoint)),
        "calibration": {"source": text.source, "tokens": text.tokens, "window": text.ids.shape[1], "digest": text.digest},
        "held_out": held_out.ids.tolist(), "rows": [r.__dict__ for r in plans.rows(model)], "kept": model.anatomy.kept,
        "names": {n: model.checkpoint.nbytes(n) for n in model.checkpoint.names},
        "parameters": sum(_count(model.checkpoint.shape(n)) for n in model.checkpoint.names),
        "file_bytes": model.checkpoint.weight_bytes, "prices": prices, "ratios": ratios, "probes": points,
    }  # fmt: skip
    return save_index(folder, index)


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


def _auto_profile(
    model: StreamedModel, folder: Path, calibration: str | Path | None, window: int | None, seed: int, progress: Progress
) -> Profile:
    """Double the calibration tokens until the plan at 3.5 bits stops changing."""
    count, earlier, found = TOKENS // 4, None, None
    while count <= MAX_AUTO_TOKENS:
        model.forget()
        part = folder.with_name(f"{folder.name}.{count}")
        found = profile(model.checkpoint.folder, part, calibration=calibration, tokens=count, window=window, seed=seed, progress=progress)
        levels = {n: c.level for n, c in plan(part, bits=3.5, engine="plain").choices.items()}
        changed = sum(levels[n] != earlier[n] for n in levels) / len(levels) if earlier else 1.0
        progress.log(f"{found.index['calibration']['tokens']} tokens: {changed:.0%} of the plan changed")
        if changed <= 0.05 or found.index["calibration"]["tokens"] < 0.9 * count:
            break
        earlier, count = levels, count * 2
    assert found is not None
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(found.folder, folder)
    for part in folder.parent.glob(f"{folder.name}.[0-9]*"):
        shutil.rmtree(part)
    return Profile.open(folder)


def _profile_in(
    work: Path, model: str | Path, calibration: str | Path | None, tokens: int | str | None, window: int | None, progress: Progress
) -> Profile:
    name = _digest(f"{calibration}:{tokens}:{window}")
    work.mkdir(parents=True, exist_ok=True)
    if tokens == "auto" and (work / f"profile-{name}" / "profile.json").exists():
        return Profile.open(work / f"profile-{name}")
    return profile(model, work / f"profile-{name}", calibration=calibration, tokens=tokens, window=window, progress=progress)


def _probe_windows(model: StreamedModel, profile: Profile) -> Windows:
    return Windows(torch.tensor(profile.index["held_out"]), "held out of the calibration text")


def _check_destination(destination: Path) -> None:
    if destination.exists():
        raise InputError(f"{destination} exists; choose another folder or remove it")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} can't be written to; choose another folder")


def _check_profile(profile: Profile, model: StreamedModel) -> None:
    if profile.index["model"] != model.checkpoint.fingerprint:
        raise InputError(f"{profile.folder}: a profile of another model; run assay profile on this one")
    if profile.index["tokenizer"] != tokenizer_digest(load_tokenizer(model.checkpoint)):
        raise InputError(f"{profile.folder}: made with another tokenizer; run assay profile again")


def _settings(model: StreamedModel, text: Windows, seed: int) -> dict[str, Any]:
    return {"model": model.checkpoint.fingerprint, "digest": text.digest, "tokens": text.tokens, "seed": seed}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Mark an unfinished profile with its settings, so that only the same ones continue it."""
    note = folder / "unfinished.json"
    if note.exists() and read_json(note, "damaged") != settings:
        raise InputError(f"{folder} holds an unfinished profile of other settings; remove it or choose another folder")
    save_text(note, json.dumps(settings, sort_keys=True))


def _recipe(folder: Path) -> dict[str, Any] | None:
    path = folder / "assay" / "recipe.json"
    return read_json(path, "damaged result") if path.exists() else None


def _method(name: str) -> str:
    if name == "auto":
        return "two_sided"
    base.get(name)
    return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32] if Path(path).is_file() else ""


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _peak_rss() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
