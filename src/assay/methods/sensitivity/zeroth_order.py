"""How much the loss moves when a matrix is shaken, from loss values alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.measure.stream import token_losses
from assay.measure.variants import Variant, outputs
from assay.methods.sensitivity._subject import Scores, Subject
from assay.model.sites import Site


@dataclass(frozen=True)
class ZerothOrder:
    """|L(W + εz) - L(W - εz)| / 2ε with standard normal z, the loss in nats per token."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models (2023)"
    prices: ClassVar[bool] = False
    samples: ClassVar[str] = "windows"
    whole_blocks: ClassVar[bool] = False

    epsilon: float = 1e-3

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. One draw of z for each matrix, one sample for each window."""
        ids, sites = subject.ids, subject.sites
        variants = [
            Variant(site.block, self._shaken(site, sign, subject.seed + i))
            for i, site in enumerate(sites) for sign in (1, -1) if site.block is not None
        ]  # fmt: skip
        losses = torch.zeros(len(sites), 2, len(ids), dtype=torch.float64)
        with outputs(subject.model, ids, variants, subject.progress) as found, subject.model.outside(tail=True), torch.no_grad():
            for i in range(len(variants)):
                for w, window in enumerate(ids.split(1)):
                    logits = subject.model.logits(found.variant(i, w))
                    losses[i // 2, i % 2, w] = token_losses(logits, window).double().mean()
        slopes = (losses[:, 0] - losses[:, 1]).abs() / (2 * self.epsilon)
        return dict(zip((site.name for site in sites), slopes, strict=True))

    def _shaken(self, chosen: Site, sign: int, seed: int) -> Callable[[Site, Tensor], Tensor]:
        def override(site: Site, weight: Tensor) -> Tensor:
            if site.name != chosen.name:
                return weight
            return weight + sign * self.epsilon * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))

        return override


METHOD = ZerothOrder
