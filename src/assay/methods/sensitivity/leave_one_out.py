"""The truth that the others are judged by: one matrix rounded, the model run, the divergence measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from assay.measure.stream import token_divergences
from assay.measure.variants import Variant, outputs
from assay.methods.sensitivity._subject import Scores, Subject


@dataclass(frozen=True)
class LeaveOneOut:
    """Measured KL of the model with one matrix rounded; as many runs of the model as it has matrices."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "none (measured)"
    prices: ClassVar[bool] = True
    samples: ClassVar[str] = "windows"
    whole_blocks: ClassVar[bool] = False

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Nats per token, one sample for each window."""
        ids, sites = subject.ids, subject.sites
        variants = [Variant(site.block, subject.rounding(site)) for site in sites if site.block is not None]
        rows = torch.zeros(len(sites), len(ids), dtype=torch.float64)
        with outputs(subject.model, ids, variants, subject.progress) as found, subject.model.outside(tail=True), torch.no_grad():
            for w in range(len(ids)):
                reference = subject.model.logits(found.original(w))
                for i in range(len(sites)):
                    rows[i, w] = token_divergences(reference, subject.model.logits(found.variant(i, w))).double().mean()
        return dict(zip((site.name for site in sites), rows, strict=True))


METHOD = LeaveOneOut
