"""The job: open a checkpoint, measure it, plan a budget, carry the plan out, prove it, hand it over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import assay.engines.convert
import assay.engines.load
from assay import engines
from assay.budget import plans, presets
from assay.budget.plan import Plan
from assay.budget.size import Budget
from assay.engines.write import check_space
from assay.execute import Results, execute
from assay.handover import hand_over
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows, load_tokenizer, tokenizer_digest, windows
from assay.methods import base
from assay.model.checkpoint import Checkpoint, read_json
from assay.model.errors import InputError, ShortfallError
from assay.model.files import save_json, unless_refused
from assay.model.progress import Progress, Silent
from assay.model.sites import Site, key_of
from assay.polish import check as check_polish
from assay.polish import polish as polish_whole
from assay.profiling import REHEARSED, TOKENS, WINDOW, make_profile, stable_profile, text_digest
from assay.prove.divergence import Candidate, compare
from assay.transforming import steps_of
from assay.transforming import transform as apply_transforms

JUDGE_TOKENS = 30_720
FALL_BACK_SHARE = 0.05


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
        for r in plans.rows(streamed, checkpoint.nbytes)
    ]
    inside = [r for r in rows if r["block"] is not None]
    return {
        "model": str(checkpoint.folder), "family": anatomy.family, "blocks": len(anatomy.block_names),
        "parameters": sum(math.prod(checkpoint.shape(n)) for n in checkpoint.names),
        "bytes": checkpoint.weight_bytes, "tied": anatomy.tied, "sites": rows, "kept": anatomy.kept,
        "inside": {"sites": len(inside), "parameters": sum(math.prod(r["shape"]) for r in inside)},
    }  # fmt: skip


def profile(
    model: str | Path, out: str | Path, *, calibration: str | Path | None = None, tokens: int | str | None = None,
    window: int | None = None, seed: int = 0, methods: Sequence[str] = REHEARSED, levels: Sequence[str] = (),
    token_weights: str = "none", progress: Progress | None = None,
) -> Profile:  # fmt: skip
    """Measure a model into a folder. Continues where an earlier call with the same settings was cut off."""
    streamed, listener = StreamedModel(open_model(model)), progress or Silent()
    wanted = [presets.level(name) for name in levels]
    more = (seed, listener, methods, wanted, token_weights)
    if tokens == "auto":
        return stable_profile(streamed, Path(out), calibration, window, *more)
    return make_profile(streamed, Path(out), calibration, int(tokens or TOKENS), window, *more)


def plan(
    source: str | Path, *, size: str | int | None = None, bits: float | None = None, max_loss: float | None = None,
    level: str | None = None, engine: str = "transformers", method: str = "auto", keep: Sequence[str] = (),
    planner: str = "lagrange", uniform: bool = False,
) -> Plan:  # fmt: skip
    """Spend a budget on a profile; needs the profile only. Raises InputError for impossible budgets."""
    chosen = _method(method, engine)
    budget = _budget(size, bits, max_loss, level, chosen)
    return plans.make(Profile.open(source), budget, engines.get(engine), chosen, keep, planner, uniform)


def compress(
    model: str | Path, out: str | Path, *, plan: str | Path | Plan | None = None, profile: str | Path | None = None,
    size: str | int | None = None, bits: float | None = None, max_loss: float | None = None, level: str | None = None,
    method: str = "auto", calibration: str | Path | None = None, tokens: int | str | None = None, window: int | None = None,
    engine: str = "transformers", keep: Sequence[str] = (), uniform: bool = False, threads: int | None = None,
    polish: float | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compress a model into the new folder `out`; runs the steps that were not done before.

    polish: minutes of tuning scales and norms end to end after rounding; needs memory for the whole model.
    Everything unfinished lies in `.NAME.assay` beside `out`; the same call continues from there. While that
    is there, `out` itself was not read back yet, and is written again.
    """
    started, progress = perf_counter(), progress or Silent()
    if threads:
        torch.set_num_threads(threads)
    destination = Path(out)
    work = destination.absolute().parent / f".{destination.name}.assay"
    unproven = work.exists() and _recipe(destination) is not None
    if not unproven:
        _check_destination(destination)
    checkpoint = open_model(model)
    given = plan if isinstance(plan, Plan) or plan is None else Plan.load(plan)
    contract = engines.get(given.engine if given else engine)
    method = _method(given.method, given.engine) if given else _method(method, engine)
    budget = Budget(**given.budget) if given else _budget(size, bits, max_loss, level, method)
    streamed = StreamedModel(checkpoint)
    if polish is not None:
        check_polish(streamed, polish)
    if given:
        known = None if profile or tokens == "auto" else text_digest(streamed, calibration, int(tokens or TOKENS), window)
        plans.check_origin(given, checkpoint.fingerprint, known)
    expected = given.nbytes_tensors if given else plans.outlook(streamed, budget, contract, method, keep)
    check_space(work.parent, checkpoint.weight_bytes if contract.layout == "plain" else expected)
    given_text = {"calibration": calibration, "tokens": tokens, "window": window}
    measured = Profile.open(profile) if profile else _profile_in(work, model, given_text, method, budget, progress)
    _check_profile(measured, streamed, method)
    if given is None:
        chosen = plans.make(measured, budget, contract, method, keep, "lagrange", uniform)
    else:
        chosen = plans.checked(measured, given, contract)
    twin = plans.uniform_twin(measured, chosen, contract, keep) if given is None else None
    chosen, results = _solve_better(streamed, measured, chosen, twin, work, progress)
    if polish is not None:
        results = polish_whole(streamed, results, measured, polish, _blocks(work, chosen) / f"polish-{polish:g}", progress)
        chosen = plans.polished(chosen, results.polish or {})
    if unproven:
        shutil.rmtree(destination)
    report = hand_over(streamed, chosen, measured, contract, results, destination)
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
    if recipe and original.checkpoint.fingerprint not in (recipe["model"], recipe.get("origin")):
        raise InputError(f"{out} was made from another model than {against}")
    length = window or int((recipe or {}).get("calibration", {}).get("window", WINDOW))
    judge = windows(original.checkpoint, text, "evaluation", tokens or JUDGE_TOKENS, length, original.vocabulary)
    if recipe and _seen(original, text, recipe["calibration"]):
        raise InputError(f"{text} is what {out} was calibrated on; judge it on other text")
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


def transform(
    model: str | Path, out: str | Path, names: str | Sequence[str], *, profile: str | Path | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a model with exact transforms applied: other weights, the same function, so that it compresses better.

    names: in the order in which they are applied; those that read statistics need a profile of `model`.
    """
    _check_destination(Path(out))
    wanted, measured = [names] if isinstance(names, str) else list(names), Profile.open(profile) if profile else None
    source = open_model(model)
    made = apply_transforms(source, wanted, Path(out), measured, seed, progress or Silent())
    done = steps_of(made)[-len(wanted) :]
    return {"out": str(out), "source_bytes": source.weight_bytes, "bytes": made.weight_bytes, "steps": done}


def export(out: str | Path, to: str, destination: str | Path) -> dict[str, Any]:
    """Write a compressed checkpoint in another layout, see `TARGETS`, where that holds the same weights exactly."""
    _check_destination(Path(destination))
    contract = assay.engines.convert.convert(Path(out), to, Path(destination))
    return {"out": str(destination), "to": to, "engine": contract.name, "bytes": Checkpoint.open(destination).weight_bytes}


convert = export


def load(out: str | Path, kernels: bool = True) -> Any:
    """A transformers model of a compressed checkpoint that stays compressed in memory; kernels: see `engines.load`."""
    return assay.engines.load.load(Path(out), kernels)


def list_methods() -> list[dict[str, Any]]:
    """Every method with its facts."""
    encoders = [(name, base.get(name)()) for name in base.names()]
    transforms = [(name, base.load(name, "transform")) for name in base.names("transform")]
    return [
        {"name": n, "verb": m.verb, "paper": m.paper, "needs": list(m.needs), "summary": (m.__doc__ or "").splitlines()[0],
         "formats": list(m.formats), "levels": [x.name for x in m.levels(256)]}
        for n, m in encoders
    ] + [
        {"name": n, "verb": m.verb, "paper": m.paper, "needs": list(m.needs), "summary": (m.__doc__ or "").splitlines()[0]}
        for n, m in transforms
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


def _profile_in(
    work: Path, model: str | Path, text: Mapping[str, Any], method: str, budget: Budget, progress: Progress
) -> Profile:
    folder = work / f"profile-{_digest(f'{text}:{method}:{budget.level}')}"
    levels = [budget.level] if budget.level else []
    with unless_refused(work):
        return profile(model, folder, **text, methods=(method,), levels=levels, progress=progress)


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


def _check_profile(profile: Profile, model: StreamedModel, method: str) -> None:
    if profile.index["model"] != model.checkpoint.fingerprint:
        raise InputError(f"{profile.folder}: a profile of another model; run assay profile on this one")
    if profile.index["tokenizer"] != tokenizer_digest(load_tokenizer(model.checkpoint)):
        raise InputError(f"{profile.folder}: made with another tokenizer; run assay profile again")
    if missing := [kind for kind in base.weightwise(method) if kind not in profile.index["settings"]["weightwise"]]:
        raise InputError(f"{profile.folder} holds no {missing[0]}; run assay profile with --method {method}")


def _recipe(folder: Path) -> dict[str, Any] | None:
    path = folder / "assay" / "recipe.json"
    return read_json(path, "damaged result") if path.exists() else None


def _method(name: str, engine: str) -> str:
    """What a name stands for: auto is the quick default, best what measured best in the engine's formats."""
    if name in ("auto", "best"):
        best = "trellis" if "trellis" in engines.get(engine).formats else "admm"
        return best if name == "best" else "two_sided"
    base.get(name)
    return name


def _budget(size: str | int | None, bits: float | None, max_loss: float | None, level: str | None, method: str) -> Budget:
    """Raises InputError for none, for two, and for a level that the method can't make."""
    wanted = presets.level(level) if level else None
    if wanted:
        presets.fit(method, wanted)
    return Budget(size=size, bits=bits, max_loss=max_loss, level=wanted.name if wanted else None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seen(model: StreamedModel, text: str | Path | None, calibration: dict[str, Any]) -> bool:
    """Whether a text starts with the very windows that a result was calibrated on."""
    if text is None:
        return False
    both = windows(model.checkpoint, text, "calibration", calibration["tokens"], calibration["window"], model.vocabulary)
    return both.digest == calibration["digest"]


def _peak_rss() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
