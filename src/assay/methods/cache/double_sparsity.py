"""Reads few tokens, found by few channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods.cache._channels import at_channels
from assay.methods.cache._watch import watch
from assay.model.errors import InputError
from assay.runtime.attention import Step, group_reduce, grouped
from assay.runtime.picked import guesses


@dataclass(frozen=True, eq=False)
class DoubleSparsity:
    """Each new token reads `read` of the cache (at least `least`): the largest logits by `label` of the channels.

    Channels are those with the largest mean |query * key| of a token with itself on the calibration text, fixed for each
    layer and head. The first `dense` layers and prompts read everything; nothing is dropped, so memory grows by the
    labels and what falls is what is read. offload: keys and values of the other layers lie in pinned host memory (of a
    model on a CPU: in a mapped file), and each token fetches what it reads; the paper fetches a layer ahead, this doesn't.
    """

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    paper: ClassVar[str] = "Post-Training Sparse Attention with Double Sparsity (2024)"
    read: float = 1 / 16
    least: int = 16
    label: float = 0.25
    dense: int = 2
    offload: bool = False
    channels: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if not (0 < self.read <= 1 and 0 < self.label <= 1):
            raise InputError(f"read={self.read:g} and label={self.label:g}; give shares above 0 and up to 1")

    def calibrated(self, model: PreTrainedModel, ids: Tensor) -> DoubleSparsity:
        """With channels measured on token ids [windows, tokens]."""
        sums: dict[int, Tensor] = {}

        def see(step: Step) -> None:
            own = grouped(step.query, step.keys.shape[1]) * step.keys[:, :, None]
            sums[step.layer] = sums.get(step.layer, 0) + own.float().abs().sum((0, 2, 3))

        watch(model, ids, see)
        count = max(int(self.label * next(iter(sums.values())).shape[-1]), 1)
        return replace(self, channels=tuple(sums[i].topk(count, -1)[1].sort(-1)[0] for i in range(len(sums))))

    def away(self, layer: int) -> bool:
        """See `Reader`."""
        return self.offload and layer >= self.dense

    def labels(self, keys: Tensor, layer: int, head: int) -> Tensor:
        """See `Reader`."""
        if layer < self.dense:
            return keys[..., :0]
        return at_channels(keys, self.channels[layer][head : head + keys.shape[1]][None])

    def pick(self, query: Tensor, labels: Tensor, positions: Tensor, layer: int, head: int) -> Tensor | None:
        """See `Reader`."""
        slots = labels.shape[2]
        count = min(max(int(self.read * slots), self.least), slots)
        if layer < self.dense or count == slots:
            return None
        if labels.device.type == "cpu" and labels.dtype == query.dtype == torch.float32 and not query.requires_grad:
            channels = self.channels[layer][head : head + labels.shape[1]]
            return guesses(query, channels, labels, positions).topk(count, -1)[1]
        asked = group_reduce(grouped(query, labels.shape[1]))
        guess = at_channels(asked, self.channels[layer][head : head + labels.shape[1]][None]) @ labels.mT
        return guess[:, :, 0].masked_fill(positions < 0, -torch.inf).topk(count, -1)[1].sort(-1)[0]


METHOD = DoubleSparsity
