"""The mean curvature of the loss in a matrix, whatever the direction of its rounding error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.measure.stream import token_losses
from assay.methods.sensitivity._subject import Scores, Subject
from assay.model.sites import Site


@dataclass(frozen=True)
class HessianTrace:
    """½ tr(H)/n · ‖d‖² of the rounding error d, the trace by Hutchinson's estimate; holds the whole model in memory."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks (2019)"
    prices: ClassVar[bool] = True
    samples: ClassVar[str] = "windows and probes"
    whole_blocks: ClassVar[bool] = False

    probes: int = 4

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Nats per token; one sample for each window, the mean of `probes` probes."""
        model, sites = subject.model, subject.sites
        names = list(dict.fromkeys(site.parameter for site in sites))
        generator = torch.Generator().manual_seed(subject.seed)
        rows = []
        with model.whole() as network, subject.progress.task("Hessian traces", len(subject.ids)) as advance:
            parameters = [network.get_parameter(name).requires_grad_(True) for name in names]
            for ids in subject.ids.split(1):

                def loss(ids: Tensor = ids) -> Tensor:
                    return token_losses(network(input_ids=ids).logits, ids).mean()

                found = dict(zip(names, diagonals(loss, parameters, self.probes, generator), strict=True))
                rows.append(torch.stack([_part(found[site.parameter], site).double().sum() for site in sites]))
                advance()
        traces = torch.stack(rows, 1)
        errors = [(subject.rounded(w) - w).square().mean() for w in map(subject.weight, sites)]
        return {s.name: 0.5 * t * e for s, t, e in zip(sites, traces, errors, strict=True)}


def diagonals(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], probes: int, generator: torch.Generator
) -> list[Tensor]:  # fmt: skip
    """Estimates of the Hessian's diagonal, v ⊙ Hv averaged over vectors v of random signs; exact where it is diagonal."""
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    totals = [torch.zeros_like(p) for p in parameters]
    for probe in range(probes):
        signs = [torch.randint(0, 2, p.shape, generator=generator).to(p.dtype) * 2 - 1 for p in parameters]
        products = torch.autograd.grad(gradients, parameters, signs, retain_graph=probe < probes - 1, materialize_grads=True)
        for total, v, product in zip(totals, signs, products, strict=True):
            total += v * product / probes
    return totals


def _part(values: Tensor, site: Site) -> Tensor:
    """What a parameter holds of a site."""
    if site.expert is None or site.rows is None:
        return values
    return values[site.expert, slice(*site.rows)]


METHOD = HessianTrace
