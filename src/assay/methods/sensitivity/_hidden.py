"""The hidden states between blocks, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from assay.methods.sensitivity._subject import Subject


def states(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Input and output of each block in turn, float32 [windows, length, hidden], on the held-out windows."""
    model, parts = subject.model, subject.ids.split(8)
    model.forget()
    with torch.no_grad():
        with model.outside(tail=False):
            hidden = [model.embed(ids) for ids in parts]
        with subject.progress.task("hidden states, block by block", len(model.blocks)) as advance:
            for index in range(len(model.blocks)):
                with model.block(index):
                    after = [model.run_block(index, h, b) for b, h in enumerate(hidden)]
                yield torch.cat(hidden), torch.cat(after)
                hidden = after
                advance()


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Mean over tokens of the cosine of [windows, length, hidden] each -> float64 [windows]."""
    return functional.cosine_similarity(first.double(), second.double(), dim=-1).clamp(-1, 1).mean(-1)
