"""Hands a result over: the folder is written, reopened with another reader, and every tensor accounted for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from assay.budget import plans
from assay.budget.plan import Plan
from assay.engines import reopen, write
from assay.engines.contract import Contract
from assay.engines.fused import share_units
from assay.engines.layout import nbytes
from assay.execute import Results
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import ShortfallError
from assay.model.ledger import Entry, Fate, Ledger
from assay.model.level import Level
from assay.model.sites import Site
from assay.transforming import origin


def hand_over(
    model: StreamedModel, plan: Plan, profile: Profile, contract: Contract, results: Results, destination: Path
) -> dict[str, Any]:
    """Write the folder, reopen it with another reader, and close the ledger."""
    levels = {name: Level.parse(s.level) for name, s in results.solved.items()}
    loaders = share_units(results.loaders(), levels) if contract.fused else results.loaders()
    source = model.checkpoint.replaced(results.plain)
    ledger = _ledger(model, source, plan, results, contract)
    recipe = {
        "model": model.checkpoint.fingerprint, "origin": origin(model.checkpoint),
        "calibration": dict(profile.index["calibration"]),
        "predicted": {"kl": plan.predicted, "low": plan.predicted_low, "high": plan.predicted_high,
                      "max_loss": plan.budget.get("max_loss")},
        "bits": plan.bits, "bits_all": plan.bits_all, "method": plan.method, "engine": plan.engine,
        "polish": results.polish,
        "seed": profile.index["settings"]["seed"],
        "damage": {s.site: s.damage for s in results.solved.values()},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }  # fmt: skip
    extra = {
        "assay/plan.yaml": plan.to_text(), "assay/recipe.json": json.dumps(recipe, indent=1, sort_keys=True) + "\n",
        "assay/ledger.json": json.dumps(ledger.to_json(), indent=1) + "\n",
    }  # fmt: skip
    turned = frozenset(s.name for s in model.anatomy.sites.values() if s.transposed)
    write.write(destination, source, loaders, contract, extra, levels, turned)
    try:
        reopen.compare(destination, source, loaders, contract, turned)
    except ShortfallError:
        shutil.rmtree(destination)
        raise
    written = Checkpoint.open(destination)
    stored = sum(info.nbytes for info in written.stored.values())
    if stored != ledger.nbytes:
        raise ShortfallError(f"{destination}: the ledger counts {ledger.nbytes} bytes, the files hold {stored}")
    return {
        "out": str(destination), "bytes": written.weight_bytes, "bits": plan.bits, "bits_all": plan.bits_all,
        "predicted": plan.predicted, "predicted_low": plan.predicted_low, "predicted_high": plan.predicted_high,
        "source_bytes": model.checkpoint.weight_bytes, "ledger": ledger.counts(), "sentence": plan.sentence,
    }  # fmt: skip


def _ledger(model: StreamedModel, checkpoint: Checkpoint, plan: Plan, results: Results, contract: Contract) -> Ledger:
    ledger, sites = Ledger(), model.anatomy.sites
    for name in checkpoint.names:
        before = checkpoint.nbytes(name)
        if name in results.solved:
            solved = results.solved[name]
            plain = contract.layout == "plain"
            after = write.plain_nbytes(checkpoint, name) if plain else nbytes(contract.layout, results.packed(name))
            fate: Fate = "fell_back" if solved.fell_back else "done"
            ledger.add(Entry(name, plan.choices[name].level, fate, solved.fell_back or solved.method, before, after))
        elif name in results.plain:
            ledger.add(Entry(name, None, "done", "polished", before, write.kept_nbytes(checkpoint, name, contract)))
        else:
            planned = plan.choices[name].level if name in plan.choices else None
            reason = model.anatomy.kept.get(name) or _contract_reason(contract, sites.get(name)) or plan.choices[name].why
            ledger.add(Entry(name, planned, "copied", reason, before, write.kept_nbytes(checkpoint, name, contract)))
    return ledger


def _contract_reason(contract: Contract, site: Site | None) -> str | None:
    """Why an engine keeps a site as it is; None where it need not."""
    if site is None:
        return "part of a tensor that stays whole"
    return plans.refused(contract, site)
