"""Carries out a plan and its uniform twin and keeps the one that measures better."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from dataclasses import dataclass
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
        return execute(model, plan, profile, blocks_folder(work, profile, plan, sequential), progress, sequential)

    if twin is None:
        progress.log(plan.sentence)
        return plan, carry_out(plan)
    flat = carry_out(twin)
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        held_out = _HeldOut(model, _probe_windows(profile), Path(folder) / "original", progress)
        flat_kl = held_out.kl(flat)
        plan = plans.corrected(profile, plan, twin, flat_kl)
        progress.log(plan.sentence)
        results = carry_out(plan)
        kl = held_out.kl(results)
    progress.log(f"on held-out calibration text: {kl:.4f} nats/token, uniform {twin.uniform['level']} {flat_kl:.4f}")
    if kl <= flat_kl:
        return plan, results
    used = plans.corrected(profile, twin, twin, flat_kl)
    why = f"the uniform plan measured better ({flat_kl:.4f} against {kl:.4f}) and is used"
    return dataclasses.replace(used, sentence=f"{used.sentence}; {why}"), flat


def blocks_folder(work: Path, profile: Profile, plan: Plan, sequential: bool) -> Path:
    """Where in the work folder the finished blocks of a plan lie."""
    levels = json.dumps({n: c.level for n, c in plan.choices.items()}, sort_keys=True)
    text = f"{plan.model}:{profile.digest}:{plan.method}:{sequential}:{levels}"
    return work / f"blocks-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class _HeldOut:
    """Measures results on one text, and runs the original through it once. kept: a folder for that, not there yet."""

    model: StreamedModel
    windows: Windows
    kept: Path
    progress: Progress

    def kl(self, results: Results) -> float:
        """Nats per token."""
        changed = {"plan": Candidate(StreamedModel(self.model.checkpoint, results.decoded))}
        scores = compare(self.model, changed, self.windows, self.progress, kl_only=True, kept=self.kept)
        return float(torch.cat(scores["plan"].kl).double().mean())


def _probe_windows(profile: Profile) -> Windows:
    return Windows(torch.tensor(profile.index["held_out"]), "held out of the calibration text")
