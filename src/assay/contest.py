"""Carries out a plan and its uniform twin and keeps the one that measures better."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from assay.budget import plans
from assay.budget.plan import Plan
from assay.execute import Results, execute
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows
from assay.model.progress import Progress
from assay.prove.divergence import Candidate, compare


def solve_better(
    model: StreamedModel, profile: Profile, plan: Plan, twin: Plan | None, work: Path, progress: Progress, sequential: bool
) -> tuple[Plan, Results]:
    """Carry out the plan and its uniform twin; the twin's measured loss corrects the promise, the better one stays."""

    def carry_out(plan: Plan) -> Results:
        return execute(model, plan, profile, blocks_folder(work, plan, sequential), progress, sequential)

    if twin is None:
        progress.log(plan.sentence)
        return plan, carry_out(plan)
    held_out = _probe_windows(model, profile)
    flat = carry_out(twin)
    flat_kl = _mean_kl(model, flat, held_out, progress)
    plan = plans.corrected(profile, plan, twin, flat_kl)
    progress.log(plan.sentence)
    results = carry_out(plan)
    kl = _mean_kl(model, results, held_out, progress)
    progress.log(f"on held-out calibration text: {kl:.4f} nats/token, uniform {twin.uniform['level']} {flat_kl:.4f}")
    if kl <= flat_kl:
        return plan, results
    sentence = f"{twin.sentence}; the uniform plan measured better ({flat_kl:.4f} against {kl:.4f}) and is used"
    return dataclasses.replace(plans.corrected(profile, twin, twin, flat_kl), sentence=sentence), flat


def blocks_folder(work: Path, plan: Plan, sequential: bool) -> Path:
    """Where in the work folder the finished blocks of a plan lie."""
    levels = json.dumps({n: c.level for n, c in plan.choices.items()}, sort_keys=True)
    text = f"{plan.model}:{plan.profile}:{plan.method}:{sequential}:{levels}"
    return work / f"blocks-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _mean_kl(model: StreamedModel, results: Results, windows: Windows, progress: Progress) -> float:
    changed = StreamedModel(model.checkpoint, results.decoded)
    scores = compare(model, {"plan": Candidate(changed)}, windows, progress)["plan"]
    return float(torch.cat(scores.kl).double().mean())


def _probe_windows(model: StreamedModel, profile: Profile) -> Windows:
    return Windows(torch.tensor(profile.index["held_out"]), "held out of the calibration text")
