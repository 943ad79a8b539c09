"""What a result loses together with the cache that its plan gives it, measured while that cache is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from assay import engines
from assay.budget.caches import Stored, kinds
from assay.budget.plan import Plan
from assay.caching import policies
from assay.engines.load import load
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows, recall
from assay.model.errors import InputError
from assay.prompted import TAIL_SHARE, Prompted
from assay.prove.divergence import interval
from assay.runtime.hook import check_model
from assay.runtime.policy import Stack

KEPT_BYTES = 1 << 28
"""Of the original's log-probabilities that are in memory."""
PART, FITTED = 8, 4
REGIME = "three quarters of each window as a prompt, the last quarter predicted from the cache"


def measured(folder: Path, original: StreamedModel, recipe: dict[str, Any], judge: Windows) -> dict[str, Any] | None:
    """KL of weights and cache together, of the weights alone on the same tokens, and what was predicted.

    None where the plan names no cache that loses anything. Loads both models whole, one after the other. Engines other than
    assay are simulated: their cache types as policies, around the weights that they would decode. Where no policy can be put
    into the model, `refused` says why.
    """
    plan = Plan.load(folder / "assay" / "plan.yaml")
    if not plan.cache.get("nats"):
        return None
    engine = engines.get(plan.engine).name
    stated = [Stored.parse(line) for line in plan.cache["layers"]]
    attached = policies(stated, plan.cache.get("evict"), engine)
    wide = judge.ids.shape[1] // TAIL_SHARE * original.vocabulary * 4
    ids = judge.ids[: max(4, KEPT_BYTES // wide)]
    try:
        whole = AutoModelForCausalLM.from_pretrained(original.checkpoint.folder, dtype=torch.float32).eval()
        check_model(whole)
    except (InputError, OSError, ValueError) as error:
        return {"refused": str(error).splitlines()[0], "cache": kinds(stated)}
    reference = torch.cat(_tails(whole, ids, [Stack()])[0])
    del whole
    model = load(folder, kernels=False).float().eval()
    text = recall(original.checkpoint, recipe["calibration"], original.vocabulary, "the cache").ids if _needs(attached) else None
    fitted = [
        p.calibrated(model, text[: FITTED * PART]) if text is not None and "calibration" in p.needs else p for p in attached
    ]
    alone, both = (_kl(reference, torch.cat(found)) for found in _tails(model, ids, [Stack(), Stack.of(fitted)]))
    low, high = interval(both)
    return {
        "measured": float(both.mean()), "low": low, "high": high, "weights": float(alone.mean()),
        "predicted": plan.cache["predicted"], "predicted_low": plan.cache["predicted_low"],
        "predicted_high": plan.cache["predicted_high"], "cache": kinds(stated),
        "tokens": reference.shape[0] * reference.shape[1], "regime": REGIME, "simulated": engine != "assay",
    }  # fmt: skip


def _needs(attached: list[Any]) -> bool:
    return any("calibration" in p.needs for p in attached)


def _tails(model: PreTrainedModel, ids: Tensor, stacks: list[Stack]) -> list[list[Tensor]]:
    """Log-probabilities after the prompts of windows, under each stack."""
    found: list[list[Tensor]] = [[] for _ in stacks]
    for part in ids.split(PART):
        prompt = Prompted.of(model, part)
        for stack, rows in zip(stacks, found, strict=True):
            rows.append(prompt.tail(stack)[0])
    return found


def _kl(reference: Tensor, candidate: Tensor) -> Tensor:
    """Nats per token of each window, float64 [windows]."""
    return (reference.exp() * (reference - candidate)).sum(-1).double().mean(1)
