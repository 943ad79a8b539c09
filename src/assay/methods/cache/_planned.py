"""Budgets for every head of every layer, planned on text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods.cache._evict import Evict
from assay.methods.cache._watch import watch
from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.hook import attached
from assay.runtime.policy import Stack

MIXED = (0.5, 1.0)
Policy = TypeVar("Policy", bound=Evict)


def planned(policy: Policy, model: PreTrainedModel, ids: Tensor) -> Policy:
    """The policy with a weight for each head: its mean number of tokens under the plan of `counts` over ids [windows, tokens].

    What is retained is measured in the policy's own score, each head's divided by its sum. Few sharp heads may matter more
    than their mass says; so the plan, even shares, and what lies halfway are tried on the same text, and what moves the
    model's own predictions least, in KL, is taken. Raises InputError for policies whose heads all keep the same tokens.
    """
    if policy.shared:
        raise InputError(
            "shape='planned' gives heads budgets of their own, and here they keep the same tokens; use another shape"
        )
    found: dict[int, list[Tensor]] = {}

    def see(step: Step) -> None:
        nothing = tuple(step.keys.new_zeros(step.keys.shape[:3], dtype=torch.float32) for _ in range(policy.statistics))
        score = policy.score(step, policy.observe(step, nothing)).float().clamp_min(0)
        found.setdefault(step.layer, []).append(score / score.sum(-1, keepdim=True).clamp_min(1e-30))

    watch(model, ids, see)
    scores = torch.stack([torch.cat(found[layer]) for layer in sorted(found)], 1)
    kept = policy.tokens if policy.tokens is not None else math.ceil(policy.budget * ids.shape[1] - 1e-9)
    always = policy.sinks + policy.recent(kept)
    spent = torch.stack([counts(row, kept, always) for row in scores]).double().mean(0)
    even = spent.mean()
    tried = [replace(policy, shape="uniform")]
    for part in MIXED:
        weights = part * spent + (1 - part) * even
        tried.append(replace(policy, shape=tuple(tuple(layer) for layer in weights.tolist())))
    exact = _tail(model, None, ids)
    return min(tried, key=lambda p: float((exact.exp() * (exact - _tail(model, p, ids))).sum(-1).mean()))


def _tail(model: PreTrainedModel, policy: Evict | None, ids: Tensor) -> Tensor:
    """Log-probabilities of the last quarter of each window, of up to eight, after the rest was read under a policy."""
    ids, start = ids[:8].to(model.device), ids.shape[1] - max(ids.shape[1] // 4, 1)
    with torch.no_grad(), attached(model, Stack(policy)):  # type: ignore[arg-type]
        cache = model(input_ids=ids[:, :start], use_cache=True, logits_to_keep=1).past_key_values
        return model(input_ids=ids[:, start:], past_key_values=cache, use_cache=True).logits.float().log_softmax(-1)


def counts(scores: Tensor, kept: int, always: int) -> Tensor:
    """Tokens of each head, int [layers, H], that together retain most of scores [layers, H, S], not negative.

    kept: tokens of a head on average; always: those that every head keeps, the best of which are free. As a head's tokens
    come by falling score, the best choice for a total is one threshold for all heads (the Lagrange multiplier of the total).
    """
    layers, heads, slots = scores.shape
    ordered = scores.sort(-1, descending=True)[0]
    always = min(always, kept, slots)
    ordered[..., :always] = torch.inf
    chosen = ordered.flatten().topk(min(kept, slots) * layers * heads)[1]
    return torch.bincount(chosen // slots, minlength=layers * heads).view(layers, heads)
