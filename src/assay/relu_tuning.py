"""Tunes a model whose gates are ReLUs to neurons that are exactly zero.

ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models (2024), at small scale: its
loss and its schedule, not its tens of billions of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from assay.measure.cut_cross_entropy import cut_cross_entropy
from assay.methods.activation._sparse import activations
from assay.methods.activation.ppl_p import outputs
from assay.model.errors import InputError

CLIP = 1.0
SCALES = ("logits_scaling", "logit_scale")
"""What configs call a factor of the logits."""


@dataclass(frozen=True)
class Stages:
    """The penalty's weight over the steps: 0 until `adapt`, then the first of `weights` until its end, then up to each next
    one along half a sine by its end, and held there. ends: a step for each weight, rising.

    Raises InputError for other ends, and for weights below 0.
    """

    adapt: int = 40
    weights: tuple[float, ...] = (0.1, 0.8)
    ends: tuple[int, ...] = (60, 180)

    def __post_init__(self) -> None:
        marks = (self.adapt, *self.ends)
        if len(self.weights) != len(self.ends) or list(marks) != sorted({*marks}) or self.adapt < 0 or min(self.weights) < 0:
            raise InputError("stages: give a weight of 0 or more for each end, and ends that rise from `adapt` on")

    def weight(self, step: int) -> float:
        """Of the penalty at a step counted from 0."""
        if step < self.adapt:
            return 0.0
        before, start = self.weights[0], self.adapt
        for weight, end in zip(self.weights, self.ends, strict=True):
            if step < end:
                rise = 0.5 * (math.sin(-math.pi / 2 + math.pi * (step - start) / (end - start)) + 1)
                return before + rise * (weight - before)
            before, start = weight, end
        return before


@dataclass(frozen=True)
class Tuned:
    """What became of a model: nats per token and share of zero neurons on the held-out windows, as it came, with its gates
    made ReLUs, and after tuning; and (penalty weight, loss, share of zeros) of the training batches at every step.
    """

    loss: tuple[float, float, float]
    zeros: tuple[float, float, float]
    steps: tuple[tuple[float, float, float], ...]


def tune_relu(
    model: PreTrainedModel, ids: Tensor, held_out: Tensor, *, steps: int = 200, stages: Stages | None = None, batch: int = 8,
    rate: float = 1e-4, seed: int = 0, tell: Callable[[int, float, float], None] | None = None,
) -> Tuned:  # fmt: skip
    """Make a model's gates ReLUs and train it, in place, on loss plus weight times mean size of the feed-forward neurons.

    ids, held_out: int [windows, tokens], to train and to judge; the penalty is the mean over tokens and neurons, summed over
    layers. AdamW without weight decay, because decay would confound the penalty; tell(step, loss, share of zeros) is called
    at every step. Raises InputError for ids of another shape and for models whose blocks have no single activation.
    """
    for name, x in (("ids", ids), ("held_out", held_out)):
        if x.ndim != 2 or x.is_floating_point() or x.shape[1] < 2 or not len(x):
            raise InputError(f"{name} of shape {list(x.shape)}; give token ids [windows, tokens]")
    if steps < 1 or batch < 1:
        raise InputError(f"{steps} steps of {batch} windows; give 1 or more of both")
    stages = stages or Stages()
    came = judge(model, held_out)
    relufy(model)
    made = judge(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator, log = torch.Generator().manual_seed(seed), []
    before = model.training
    model.train()
    try:
        for step in range(steps):
            part = ids[torch.randint(len(ids), (batch,), generator=generator)].to(model.device)
            with _neurons(model) as seen:
                loss = _loss(model, part)
            penalty = torch.stack([x.abs().mean() for x in seen]).sum()
            optimizer.zero_grad()
            (loss + stages.weight(step) * penalty).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            zeros = float(torch.stack([(x == 0).float().mean() for x in seen]).mean())
            log.append((stages.weight(step), float(loss.detach()), zeros))
            if tell:
                tell(step, float(loss.detach()), zeros)
    finally:
        model.train(before)
    done = judge(model, held_out)
    return Tuned((came[0], made[0], done[0]), (came[1], made[1], done[1]), tuple(log))


def relufy(model: PreTrainedModel) -> None:
    """Make the activation of every feed-forward block a ReLU, and say so in the config. Raises InputError without one."""
    for parent, name in activations(model):
        setattr(parent, name, nn.ReLU())
    for key in ("hidden_act", "hidden_activation"):
        if hasattr(model.config, key):
            setattr(model.config, key, "relu")


@torch.no_grad()
def judge(model: PreTrainedModel, ids: Tensor, batch: int = 8) -> tuple[float, float]:
    """Nats per token of ids [windows, tokens], and the share of feed-forward neurons that are exactly zero."""
    losses, zeros = [], []
    for part in ids.to(model.device).split(batch):
        with _neurons(model) as seen:
            losses.append(float(_loss(model, part)) * len(part))
        zeros.append(float(torch.stack([(x == 0).float().mean() for x in seen]).mean()) * len(part))
    return sum(losses) / len(ids), sum(zeros) / len(ids)


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    if head.bias is not None or any(getattr(model.config, name, None) not in (None, 1) for name in SCALES):
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return cut_cross_entropy(hidden, head.weight, ids, softcap=cap, shift=True)


@contextmanager
def _neurons(model: PreTrainedModel) -> Iterator[Sequence[Tensor]]:
    """Inputs of the output maps [B, t, f], of each layer, while the model runs."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in outputs(model).values()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
