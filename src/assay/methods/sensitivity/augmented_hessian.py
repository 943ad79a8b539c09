"""Own and inter-layer terms of the Hessian along the rounding errors of all matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.measure.variants import Outputs, Variant, outputs
from assay.methods.sensitivity._subject import Scores, Subject

ELEMENTS = 1 << 25
"""Of all variants' logits that are held at once."""


@dataclass(frozen=True)
class AugmentedHessian:
    """½ dᵢᵀHᵢᵢdᵢ + ½ Σⱼ dᵢᵀHᵢⱼdⱼ over the others j: a matrix's part in the damage of rounding all of them.

    The Hessian is the Gauss-Newton one of the loss through the logits, so that one run of the model for each matrix
    gives the terms of all pairs, where measuring pairs takes a run for each. What the errors of two matrices
    cancel counts for both.
    """

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = (
        "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization (2023)"
    )
    prices: ClassVar[bool] = True
    samples: ClassVar[str] = "windows"
    whole_blocks: ClassVar[bool] = False

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Nats per token, one sample for each window."""
        sites = subject.sites
        variants = [Variant(site.block, subject.rounding(site)) for site in sites if site.block is not None]
        with outputs(subject.model, subject.ids, variants, subject.progress) as found:
            pairs = torch.stack([_pairs(subject, found, len(sites), w) for w in range(len(subject.ids))])
        return dict(zip((site.name for site in sites), 0.5 * pairs.sum(-1).T, strict=True))


@torch.no_grad()
def _pairs(subject: Subject, found: Outputs, count: int, window: int) -> Tensor:
    """`products` over the predicting tokens of one window, per token."""
    model, total = subject.model, torch.zeros(count, count, dtype=torch.float64)
    states = [found.original(window), *(found.variant(i, window) for i in range(count))]
    length = states[0].shape[1] - 1
    step = max(1, ELEMENTS // (model.vocabulary * (count + 1)))
    with model.outside(tail=True):
        for start in range(0, length, step):
            logits = [model.logits(h[:, start : min(start + step, length)])[0] for h in states]
            total += products(logits[0], torch.stack(logits[1:]))
    return total / length


def products(reference: Tensor, logits: Tensor) -> Tensor:
    """zᵢᵀ (diag p - ppᵀ) zⱼ summed over tokens, zᵢ the change of the logits: [t, v] and [n, t, v] -> float64 [n, n].

    p: the probabilities of the reference; so half the diagonal is the KL divergence to second order.
    """
    p = reference.softmax(-1)
    change = logits - reference
    change -= (p * change).sum(-1, keepdim=True)
    scaled = (change * p.sqrt()).flatten(1)
    return (scaled @ scaled.T).double()


METHOD = AugmentedHessian
