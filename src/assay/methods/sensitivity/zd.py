"""How heavy the tails of a block's weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.sensitivity._subject import Scores, Subject


@dataclass(frozen=True)
class ZD:
    """Minus the share of a block's weights more than one standard deviation above their mean."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "Layer-Wise Quantization: Quantizing LLMs Based on Layer Importance (2024), ZD"
    prices: ClassVar[bool] = False
    samples: ClassVar[str] = ""
    whole_blocks: ClassVar[bool] = True

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. All matrices of a block are pooled; between -1 and 0."""
        blocks = range(len(subject.model.blocks))
        pooled = [[subject.weight(s).flatten() for s in subject.model.anatomy.block_sites(b)] for b in blocks]
        return subject.alike_in_blocks(torch.stack([-above(torch.cat(weights)) for weights in pooled])[:, None])


def above(weights: Tensor) -> Tensor:
    """Share of weights [n] with (w - mean) / standard deviation above 1."""
    w = weights.double()
    return ((w - w.mean()) / w.std().clamp_min(torch.finfo(w.dtype).tiny) > 1).double().mean()


METHOD = ZD
