"""Hands a result over: the folder is written, reopened with another reader, and every tensor accounted for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.budget import offers, plans
from assay.budget.agreement import Reference
from assay.budget.forecast import Forecast
from assay.budget.plan import Plan
from assay.budget.sweep import frontier
from assay.calibrated import calibrated
from assay.engines import reopen, write
from assay.engines.contract import Contract
from assay.engines.fused import share_units
from assay.engines.gguf import reopen as gguf_reopen
from assay.engines.gguf import write as gguf_write
from assay.engines.layout import nbytes
from assay.execute import Results, Solved
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.methods.solve.curvature import DAMPING
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError
from assay.model.ggml import KINDS
from assay.model.ledger import Entry, Fate, Ledger
from assay.model.level import Level
from assay.model.progress import SAVING, Progress
from assay.model.sites import Site
from assay.report.page.facts import Row, to_json
from assay.transforming import origin


def hand_over(
    model: StreamedModel, plan: Plan, profile: Profile, contract: Contract, results: Results, destination: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder, reopen it with another reader, and close the ledger."""
    levels = {name: Level.parse(s.level) for name, s in results.solved.items()}
    loaders = share_units(results.loaders(), levels) if contract.fused else results.loaders()
    source = model.checkpoint.replaced(results.plain)
    added = calibrated(model, profile, contract, levels, plan.cache_type)
    ledger = _ledger(model, source, plan, results, contract, added)
    recipe = {
        "model": model.checkpoint.fingerprint, "origin": origin(model.checkpoint),
        "calibration": dict(profile.index["calibration"]),
        "predicted": {"kl": plan.predicted, "low": plan.predicted_low, "high": plan.predicted_high,
                      "max_loss": plan.budget.get("max_loss")},
        "bits": plan.bits, "bits_all": plan.bits_all, "method": plan.method, "engine": plan.engine,
        "sequential": results.sequential, "polish": results.polish,
        "frontier": _frontier(profile, plan, contract),
        "seed": profile.index["settings"]["seed"],
        "reference": asdict(Reference.of(profile)), "damage": _damage(model, profile, results),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }  # fmt: skip
    extra = {
        "assay/plan.yaml": plan.to_text(), "assay/recipe.json": json.dumps(recipe, indent=1, sort_keys=True) + "\n",
        "assay/ledger.json": json.dumps(ledger.to_json(), indent=1) + "\n",
        "assay/sites.json": json.dumps(to_json(_rows(model, plan, ledger)), indent=1) + "\n",
    }  # fmt: skip
    turned = frozenset(s.name for s in model.anatomy.sites.values() if s.transposed)
    with progress.task(SAVING, 2) as advance:
        if contract.layout == "gguf":
            gguf_write.write(destination, source, loaders, contract, extra, levels, turned)
        else:
            write.write(destination, source, loaders, contract, extra, levels, turned, added=added)
        advance()
        try:
            if contract.layout == "gguf":
                gguf_reopen.compare(destination, source, loaders, contract, turned)
            else:
                reopen.compare(destination, source, loaders, contract, turned, added)
        except ShortfallError:
            shutil.rmtree(destination)
            raise
        advance()
    written = Checkpoint.open(destination)
    stored = sum(info.nbytes for info in written.stored.values())
    if stored != ledger.nbytes:
        raise ShortfallError(f"{destination}: the ledger counts {ledger.nbytes} bytes, the files hold {stored}")
    return {
        "out": str(destination), "bytes": written.weight_bytes, "bits": plan.bits, "bits_all": plan.bits_all,
        "predicted": plan.predicted, "predicted_low": plan.predicted_low, "predicted_high": plan.predicted_high,
        "source_bytes": model.checkpoint.weight_bytes, "ledger": ledger.counts(), "sentence": plan.sentence,
    }  # fmt: skip


def _ledger(
    model: StreamedModel, checkpoint: Checkpoint, plan: Plan, results: Results, contract: Contract, added: Mapping[str, Tensor]
) -> Ledger:
    ledger, sites = Ledger(), model.anatomy.sites
    after, dropped = _bytes_after(checkpoint, results, contract)
    for name in checkpoint.names:
        before = checkpoint.nbytes(name)
        if name in dropped:
            ledger.add(Entry(name, None, "dropped", dropped[name], before, 0))
        elif name in results.solved:
            solved = results.solved[name]
            fate: Fate = "fell_back" if solved.fell_back else "done"
            reason = solved.fell_back or _how(plan, solved, sites[name])
            ledger.add(Entry(name, plan.choices[name].level, fate, reason, before, after[name]))
        elif name in results.plain:
            ledger.add(Entry(name, None, "done", "polished", before, after[name]))
        else:
            planned = plan.choices[name].level if name in plan.choices else None
            reason = model.anatomy.kept.get(name) or _contract_reason(contract, sites.get(name)) or plan.choices[name].why
            ledger.add(Entry(name, planned, "copied", reason, before, after[name]))
    for name, tensor in added.items():
        ledger.add(Entry(name, None, "done", "measured on the calibration text", 0, tensor.nbytes))
    return ledger


def _damage(model: StreamedModel, profile: Profile, results: Results) -> dict[str, float]:
    """Nats per token of each compressed site, as a plan counts them."""
    forecast = Forecast.from_index(profile.index)
    blocks = {site.name: site.block for site in model.anatomy.sites.values()}
    return {name: s.damage * forecast.excess(blocks[name]) for name, s in results.solved.items()}


def _frontier(profile: Profile, plan: Plan, contract: Contract) -> list[dict[str, Any]]:
    """What other sizes would have cost, corrected as the plan was, for the report; empty where a plan has no choice."""
    if profile.index.get("flat"):
        return []
    try:
        points = frontier(profile, 1.5, 8, 0.5, contract, plan.method, (), "lagrange")["points"]
        ratio = plan.predicted / plans.checked(profile, plan, contract).predicted
    except (InputError, ZeroDivisionError):
        return []
    sides = (side for point in points for side in (point, point["uniform"]))
    for side in sides:
        side |= {key: ratio * side[key] for key in ("predicted", "predicted_low", "predicted_high")}
    return list(points)


def _rows(model: StreamedModel, plan: Plan, ledger: Ledger) -> list[Row]:
    """The plan site by site, for the report."""
    rows = []
    for name, choice in plan.choices.items():
        site = model.anatomy.sites[name]
        entry, level = ledger.entries[name], choice.level or "keep"
        before, after = entry.bytes_before, entry.bytes_after
        rows.append(Row(name, site.block, site.role, site.count, level, before, after, choice.damage, choice.why))
    return rows


def _how(plan: Plan, solved: Solved, site: Site) -> str:
    """The method, damping above the usual, and why the level is not the one that was asked for."""
    asked = plan.budget.get("level")
    method = f"{solved.method}; damping {solved.damping:.2g}" if solved.damping > DAMPING else solved.method
    if asked is None or Level.parse(asked).format not in KINDS or solved.level == asked:
        return method
    return f"{method}; {asked} has blocks of {KINDS[asked].weights} weights, which do not divide {site.shape[1]} inputs"


def _bytes_after(checkpoint: Checkpoint, results: Results, contract: Contract) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes that each tensor will take, and why some are left out."""
    if contract.layout == "gguf":
        return gguf_write.sizes(checkpoint, {name: Level.parse(s.level) for name, s in results.solved.items()})
    found = {}
    for name in checkpoint.names:
        if name not in results.solved:
            found[name] = write.kept_nbytes(checkpoint, name, contract)
        elif contract.layout == "plain":
            found[name] = write.plain_nbytes(checkpoint, name)
        else:
            found[name] = nbytes(contract.layout, results.packed(name))
    return found, {}


def _contract_reason(contract: Contract, site: Site | None) -> str | None:
    """Why an engine keeps a site as it is; None where it need not."""
    if site is None:
        return "part of a tensor that stays whole"
    return offers.refused(contract, site)
