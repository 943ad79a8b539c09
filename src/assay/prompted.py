"""A prompt that was read once, and what a model says after it under any policies of its cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods.cache._watch import watch
from assay.runtime.attention import Step
from assay.runtime.hook import Attached, attached
from assay.runtime.layer import Pending
from assay.runtime.policy import Stack

TAIL_SHARE = 4


@dataclass(frozen=True)
class Prompted:
    """The first three quarters of text windows as every layer saw them; the last quarter is to be predicted.

    Policies act after a layer attended to the prompt, so they change nothing in it, and one pass over it serves them all.
    """

    model: PreTrainedModel
    ids: Tensor
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor) -> Prompted:
        """Read the prompt. ids: int [windows, tokens]."""
        steps: list[Step] = []
        start = ids.shape[1] - ids.shape[1] // TAIL_SHARE
        watch(model, ids[:, :start], steps.append, len(ids))
        return cls(model, ids[:, start:], tuple(steps))

    @torch.no_grad()
    def tail(self, stack: Stack) -> tuple[Tensor, Attached]:
        """Log-probabilities [windows, tokens // 4, vocabulary] of the last quarter, and the cache as it is then.

        It comes in one piece after the prompt, so every token that is judged reads what the stack made of the prompt.
        """
        with attached(self.model, stack) as found:
            cache = found.new_cache()
            for layer, step in zip(found.layers, self.steps, strict=True):
                layer.update(step.keys, step.values)
                layer.attend(step.query, Pending(layer, step.keys, step.values), None, step.where, step.rule)
            logits = self.model(input_ids=self.ids, past_key_values=cache, use_cache=True).logits
        return logits.log_softmax(-1), found
