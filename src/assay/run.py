"""The job: open a checkpoint, measure it, plan a budget, carry the plan out, prove it, hand it over."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import assay.engines.load
from assay import cached, engines, preflight
from assay.budget import agreement, joint, offers, plans, presets, sensitivity, undo
from assay.budget.holding import check_held
from assay.budget.plan import Plan
from assay.budget.presets import method as _method
from assay.budget.sensitivity import Ranking
from assay.budget.size import Budget
from assay.budget.speed import Speeds
from assay.budget.speed import benchmark as measure_speeds
from assay.budget.sweep import STEP, frontier
from assay.calibrated import calibrated
from assay.contest import blocks_folder, solve_better
from assay.engines.write import check_space
from assay.evolving import check as check_search
from assay.evolving import evolved
from assay.exporting import export as export_as
from assay.handover import hand_over
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import load_tokenizer, seen, tokenizer_digest, windows
from assay.methods import base, listing
from assay.model import memory, sums
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError
from assay.model.files import save_note
from assay.model.level import Level
from assay.model.lock import alone
from assay.model.notes import read_recipe
from assay.model.progress import Progress, Silent
from assay.polish import check as check_polish
from assay.polish import polish as polish_whole
from assay.profiling import REHEARSED, TOKENS, WINDOW, Scope, Selection, make_profile, stable_profile, text_digest, window_length
from assay.prove import repeat
from assay.prove.tasks import Tasks, compared
from assay.report.page.render import write as write_page
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
        for r in offers.rows(streamed, checkpoint.nbytes)
    ]
    inside = [r for r in rows if r["block"] is not None]
    return {
        "model": str(checkpoint.folder), "family": anatomy.family, "blocks": len(anatomy.block_names),
        "parameters": sum(math.prod(checkpoint.shape(n)) for n in checkpoint.names),
        "bytes": checkpoint.weight_bytes, "tied": anatomy.tied, "sites": rows, "kept": anatomy.kept,
        "inside": {"sites": len(inside), "parameters": sum(math.prod(r["shape"]) for r in inside)},
    }  # fmt: skip


def rank(
    profile: str | Path, by: Sequence[str] = ("kfac",), *, model: str | Path | None = None, bits: int = sensitivity.BITS,
    progress: Progress | None = None,
) -> list[Ranking]:  # fmt: skip
    """Which weight matrices matter most, with error bars, and which to keep; a ranking for each sensitivity.

    by: names that `assay methods` lists with the verb score; all but kfac run the model. Raises InputError.
    """
    streamed = None if model is None else StreamedModel(open_model(model))
    measured = Profile.open(profile)
    return [sensitivity.rank(measured, name, streamed, progress or Silent(), bits) for name in by]


def profile(
    model: str | Path, out: str | Path, *, calibration: str | Path | None = None, tokens: int | str | None = None,
    window: int | None = None, seed: int = 0, methods: Sequence[str] = REHEARSED, levels: Sequence[str] = (),
    token_weights: str = "none", select: str | None = None, target: str | Path | None = None, progress: Progress | None = None,
) -> Profile:  # fmt: skip
    """Measure a model into a folder. Continues where an earlier call with the same settings was cut off.

    select: how to choose the windows from eight times as much text, `dsir` or `kmeans`; target: text that `dsir`
    makes the choice resemble, and that the profile is compared with in any case.
    """
    streamed, listener = StreamedModel(open_model(model)), progress or Silent()
    streamed.batch_tokens = preflight.handling(streamed, window, memory.available()).batch
    scope = Scope(methods, [presets.level(name) for name in levels])
    return _measured(
        streamed, Path(out), calibration, tokens, window, seed=seed, progress=listener, scope=scope,
        token_weights=token_weights, selection=Selection(select, target),
    )  # fmt: skip


def plan(
    source: str | Path, *, engine: str = "transformers", method: str = "auto", keep: Sequence[str] = (),
    planner: str = "lagrange", uniform: bool = False, speeds: str | Path | None = None, **budget: Any,
) -> Plan:  # fmt: skip
    """Spend a budget on a profile; needs the profile only. Raises InputError for impossible budgets.

    budget: see `Budget`; speeds: what `benchmark` wrote, for a budget of time.
    """
    if planner == "evolution":
        raise InputError("evolution measures the running model; use assay compress MODEL --planner evolution --minutes N")
    chosen = _method(method, engine)
    limits, table = _budget(chosen, **budget), Speeds.load(speeds) if speeds else None
    measured = Profile.open(source)
    return agreement.noted(measured, plans.make(measured, limits, engines.get(engine), chosen, keep, planner, uniform, table))


def sweep(
    source: str | Path, low: float, high: float, step: float = STEP, *, engine: str = "transformers", method: str = "auto",
    keep: Sequence[str] = (), planner: str = "lagrange",
) -> dict[str, Any]:  # fmt: skip
    """Size and predicted loss of the best plan at every `step` of average bits, the uniform one beside it."""
    return frontier(Profile.open(source), low, high, step, engines.get(engine), _method(method, engine), keep, planner)


def benchmark(source: str | Path, out: str | Path) -> Speeds:
    """Measure how fast this machine multiplies by the matrices of a profile, and write the table to a new file."""
    _check_destination(Path(out))
    measured = Profile.open(source)
    names = {name for prices in measured.prices.values() for name in prices}
    found = measure_speeds(offers.rows_of(measured), sorted(Level.parse(name) for name in names))
    found.save(Path(out))
    return found


def compress(
    model: str | Path, out: str | Path, *, plan: str | Path | Plan | None = None, profile: str | Path | None = None,
    method: str = "auto", calibration: str | Path | None = None, tokens: int | str | None = None, window: int | None = None,
    engine: str | None = None, keep: Sequence[str] = (), uniform: bool = False, threads: int | None = None,
    sequential: bool = False, polish: float | None = None, planner: str = "lagrange", minutes: float | None = None,
    dry_run: bool = False, progress: Progress | None = None, **budget: Any,
) -> dict[str, Any]:  # fmt: skip
    """Compress a model into the new folder `out`; runs the steps that were not done before.

    budget: see `Budget`; none where a plan is given. engine: of the plan, else transformers, where none is named.
    sequential: solve each matrix for the inputs that the compressed model gives it.
    planner: as for `plan`, or "evolution", which measures candidates for so many `minutes`. dry_run: only rehearse on
    two blocks and say what it will take.
    polish: minutes of tuning scales and norms end to end after rounding; needs memory for the whole model.
    Everything unfinished lies in `.NAME.assay` beside `out`; the same call continues from there. While that
    is there, `out` itself was not read back yet, and is written again.
    """
    started, progress = perf_counter(), progress or Silent()
    if threads:
        torch.set_num_threads(threads)
    destination = Path(out)
    work = destination.absolute().parent / f".{destination.name}.assay"
    _unproven(work, destination)
    searched = check_search(
        planner, minutes, "--plan" if plan else "--level" if budget.get("level") else "--uniform" if uniform else None
    )
    checkpoint, ready = open_model(model), Profile.open(profile) if profile else None
    if ready:
        if calibration or tokens or window:
            raise InputError("a profile has its text; leave out --calibration, --tokens and --window, or --profile")
        tokens, window = (ready.index["calibration"][key] for key in ("tokens", "window"))
    given = plan if isinstance(plan, Plan) or plan is None else Plan.load(plan)
    contract = engines.get(engine or (given.engine if given else "transformers"))
    method = _method(given.method if given and method == "auto" else method, contract.name)
    limits = Budget(**given.budget) if given else _budget(method, **budget)
    streamed = StreamedModel(checkpoint)
    if polish is not None:
        check_polish(streamed, polish)
    if given:
        if keep or uniform or method != given.method:
            raise InputError("a plan has its levels and its method; edit it, or leave out --keep, --uniform and --method")
        known = None if ready or tokens == "auto" else text_digest(streamed, calibration, int(tokens or TOKENS), window)
        plans.check_origin(given, checkpoint.fingerprint, known)
        check_held(given, streamed, contract)
        given = replace(given, engine=contract.name)
    least = joint.undecided(profile, limits)
    ahead = plans.outlook_of(given) if given else plans.outlook(streamed, limits, contract, method, keep, uniform, least)
    check_space(work.parent, checkpoint.weight_bytes if contract.layout == "plain" else ahead.files)
    given_text = {"calibration": calibration, "tokens": tokens, "window": window}
    by = preflight.handling(streamed, window, memory.available())
    streamed.batch_tokens = by.batch
    count = TOKENS if tokens in (None, "auto") else int(tokens or TOKENS)
    if dry_run:
        if ready:
            _check_profile(ready, streamed, method)
        how = {"method": method, "calibration": calibration, "window": window, "engine": contract.name, "uniform": uniform}
        wanted = {"bits": given.bits} if given else vars(limits)
        return preflight.told(
            streamed, contract, compress, wanted, how, ahead, count, by, profiled=bool(ready), planned=bool(given),
            polish=polish, near=work.parent,
        )  # fmt: skip
    with alone(work):
        unproven = _unproven(work, destination)
        progress.log(preflight.line(by, preflight.disk_needed(streamed, 0 if ready else count, ahead.tensors), ahead.files))
        levels = [Level.parse(name) for name in sorted(ahead.levels)]
        scope = Scope((method,), levels, sparing=True, flat=bool(levels) and not given and tokens != "auto")
        measured = ready or _profile_in(work, streamed, given_text, scope, progress)
        _check_profile(measured, streamed, method)
        if given:
            chosen = plans.checked(measured, given, contract)
        else:
            chosen = plans.make(measured, limits, contract, method, keep, "lagrange" if searched else planner, uniform)
            chosen = evolved(streamed, measured, chosen, contract, keep, searched, work, progress) if searched else chosen
        calibrated(streamed, measured, contract, chosen.levels, chosen.cache_type)  # refuses before the hours of solving
        twin = plans.uniform_twin(measured, chosen, contract, keep) if given is None else None
        chosen, results = solve_better(streamed, measured, chosen, twin, work, progress, sequential)
        if polish is not None:
            folder = blocks_folder(work, measured, chosen, sequential) / f"polish-{polish:g}"
            results = polish_whole(streamed, results, measured, polish, folder, progress)
            chosen = plans.polished(chosen, results.polish or {})
        if unproven:
            shutil.rmtree(destination)
        report = hand_over(streamed, chosen, measured, contract, results, destination, progress)
        write_page(destination)
        shutil.rmtree(work, ignore_errors=True)
    _check_done(report["ledger"], out, streamed)
    return report | {"seconds": perf_counter() - started, "peak_rss_bytes": memory.peak()}


def verify(
    out: str | Path, against: str | Path, *, text: str | Path | None = None, tokens: int | None = None,
    window: int | None = None, compute: str = "float32", batches: Sequence[int] = (), tasks: Sequence[str] = (),
    limit: int | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a result against its original on text that calibration never saw.

    compute: dtype of both models while they run; batches: windows read at once, to show how far that moves the figures;
    tasks: of lm-eval, `limit` examples of each, for both models as well.
    """
    if limit and not tasks:
        raise InputError("--limit counts examples of --tasks; name some, or leave it out")
    progress, examined = progress or Silent(), Tasks.of(tasks, limit) if tasks else None
    repeat.check(compute, batches)
    result, original = open_model(out), StreamedModel(open_model(against))
    sums.check(result.folder)
    recipe = read_recipe(result.folder)
    if recipe and original.checkpoint.fingerprint not in (recipe["model"], recipe.get("origin")):
        raise InputError(f"{out} was made from another model than {against}")
    length = window_length(original, window or int((recipe or {}).get("calibration", {}).get("window", WINDOW)))
    judge = windows(original.checkpoint, text, "evaluation", tokens or JUDGE_TOKENS, length, original.vocabulary)
    if recipe and text and seen(original.checkpoint, recipe["calibration"], original.vocabulary, text):
        raise InputError(f"{text} is what {out} was calibrated on; judge it on other text")
    texts = agreement.of_result(original, recipe, judge, progress) if recipe and text else None
    scores = repeat.judged(original.checkpoint, result, judge, compute, batches, progress)
    predicted = (recipe or {}).get("predicted", {})
    kl = scores.pop("kl") | {
        "predicted": predicted.get("kl"), "predicted_low": predicted.get("low"), "predicted_high": predicted.get("high"),
    }  # fmt: skip
    together = cached.measured(result.folder, original, recipe, judge) if recipe and "damage" in recipe else None
    bound, most = predicted.get("max_loss"), max(kl["measured"], (together or {}).get("measured", 0.0))
    verdict = {
        "bytes": result.weight_bytes, "bits": (recipe or {}).get("bits"), "bits_all": (recipe or {}).get("bits_all"),
        "kl": kl, **scores, "text": judge.source, "tokens": judge.tokens, "max_loss": bound,
        "passed": bound is None or most <= bound, "texts": texts, "joint": together,
        "restore": undo.suggestions(result.folder, original, recipe, kl["measured"]) if recipe and "damage" in recipe else [],
    }  # fmt: skip
    if examined:
        verdict["tasks"] = compared(result, original.checkpoint, examined)
    if recipe:
        with alone(result.folder):
            save_note(result.folder / "assay" / "verdict.json", verdict)
            if "damage" in recipe:
                write_page(result.folder)
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
    """Write a compressed checkpoint in another layout, see `TARGETS`, where that holds the same weights exactly; or a
    profile as an importance matrix, `imatrix`."""
    _check_destination(Path(destination))
    return export_as(Path(out), to, Path(destination))


convert = export


def write_report(out: str | Path, destination: str | Path) -> dict[str, Any]:
    """Write one page about a result, which opens in any browser without a network."""
    _check_destination(Path(destination))
    page = write_page(out, destination)
    return {"report": str(page), "bytes": page.stat().st_size}


def load(out: str | Path, kernels: bool = True) -> Any:
    """A transformers model of a compressed checkpoint that stays compressed in memory; kernels: see `engines.load`."""
    return assay.engines.load.load(Path(out), kernels)


def list_methods() -> list[dict[str, Any]]:
    """Every method with its facts."""
    return listing.every()


def _measured(
    model: StreamedModel, folder: Path, calibration: str | Path | None, tokens: int | str | None, window: int | None, **more: Any
) -> Profile:
    """A profile on so many tokens, or on as many as it takes; more: see `make_profile`."""
    if tokens == "auto":
        return stable_profile(model, folder, calibration, window, **more)
    return make_profile(model, folder, calibration, int(tokens or TOKENS), window, **more)


def _profile_in(work: Path, model: StreamedModel, text: Mapping[str, Any], scope: Scope, progress: Progress) -> Profile:
    given = Path(text["calibration"] or "")
    read = sums.digest(given) if given.is_file() else ""
    folder = work / f"profile-{_digest(f'{model.checkpoint.fingerprint}:{text}:{read}:{scope}')}"
    return _measured(model, folder, **text, seed=0, progress=progress, scope=scope)


def _check_done(counts: Mapping[str, int], out: str | Path, model: StreamedModel) -> None:
    """Raises ShortfallError where too many tensors fell back."""
    if counts["fell_back"] > FALL_BACK_SHARE * max(counts["planned"], 1):
        found = f"{out}: {counts['fell_back']} of {counts['planned']} tensors fell back; see assay/ledger.json"
        raise ShortfallError(f"{found} (more --tokens reach more experts)" if model.anatomy.has_experts else found)


def _unproven(work: Path, destination: Path) -> bool:
    """Whether a result is there that was not read back, as its unfinished work shows. Raises InputError for any other one."""
    if any(work.glob("*")) and read_recipe(destination) is not None:
        return True
    _check_destination(destination)
    return False


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


def _budget(method: str, **given: Any) -> Budget:
    """Raises InputError for none, for two, and for a level that the method can't make."""
    wanted = presets.level(given["level"]) if given.get("level") else None
    if wanted:
        presets.fit(method, wanted)
    return Budget(**(given | {"level": wanted.name if wanted else None}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
