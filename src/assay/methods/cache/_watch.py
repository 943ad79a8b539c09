"""Runs a model on text and shows every layer's queries, keys and values to a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods.cache._evict import Evict
from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.hook import attached
from assay.runtime.policy import Stack


@dataclass(frozen=True)
class Watch(Evict):
    """Keeps everything and calls `see` after each layer."""

    paper: ClassVar[str] = "none"
    budget: float = 1.0
    see: Callable[[Step], None] = lambda step: None

    def observe(self, step: Step, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Show the step."""
        self.see(step)
        return past


@torch.no_grad()
def watch(model: PreTrainedModel, ids: Tensor, see: Callable[[Step], None], batch: int = 8) -> None:
    """Run ids int [windows, tokens] through the model. Raises InputError for anything else."""
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise InputError(f"calibration of shape {list(ids.shape)}; give token ids [windows, tokens]")
    with attached(model, Stack(Watch(see=see))):
        for part in ids.split(batch):
            model.base_model(input_ids=part.to(model.device), use_cache=True)
