"""An attention of its own for tests: a full cache in which some columns are masked, written without assay's frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

Allowed = dict[tuple[int, int], Tensor]
"""(layer, tokens seen) -> bool [B, H, S]: what was kept after that many tokens."""


@contextmanager
def masked(model: PreTrainedModel, allowed: Allowed) -> Iterator[None]:
    """The model attends, with its full cache, to what was kept and to new tokens, causally."""

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, sliding_window=None, **_):
        length, slots = query.shape[2], key.shape[2]
        seen = slots - length
        group = query.shape[1] // key.shape[1]
        order = torch.arange(slots)
        mask = (order[None] <= order[-length:, None]).expand(len(query), key.shape[1], -1, -1).clone()
        if sliding_window is not None:
            mask &= order[None] > order[-length:, None] - sliding_window
        if seen:
            mask[..., :seen] &= allowed[module.layer_idx, seen][:, :, None]
        if attention_mask is not None:
            mask &= attention_mask[:, None, None, :slots]
        scores = query @ key.repeat_interleave(group, 1).mT * scaling
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        weights = scores.masked_fill(~mask.repeat_interleave(group, 1), torch.finfo(scores.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("masked-for-tests", attention)
    AttentionMaskInterface.register("masked-for-tests", lambda attention_mask=None, **_: attention_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "masked-for-tests"
    try:
        yield
    finally:
        model.config._attn_implementation = before
