"""The currency: what a change of a weight matrix costs, in nats per token.

    damage(D) = share/2 · tr(G D H Dᵀ)

Kronecker-factored Fisher (Martens & Grosse, Optimizing Neural Networks with Kronecker-factored
Approximate Curvature, 2015): H = E[x xᵀ], G = E[g gᵀ], g the gradient of the sequence-summed loss at
the output with labels sampled from the model; share is the part of all tokens that meets the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.measure.triangle import strips


@dataclass(frozen=True)
class Curvature:
    """Statistics of one site.

    h: [in, in], or [in] for a diagonal; g: [out, out], or [out] for a diagonal; share in (0, 1];
    tokens: how many tokens h and g are averages over; gradient, fisher: [out, in], where they were measured and asked for;
    parts: of how many tokens each part of the text gave [parts], and the diagonals of h and g on it [parts, in], [parts, out].
    """

    h: Tensor
    g: Tensor
    share: float
    tokens: int
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    parts: tuple[Tensor, Tensor, Tensor] | None = None

    def damage(self, change: Tensor) -> float:
        """Nats per token of a change [out, in], float32."""
        left = change * self.g[:, None] if self.g.ndim == 1 else self.g @ change
        if self.h.ndim == 1:
            return 0.5 * self.share * float((left * change * self.h).sum(dtype=torch.float64))
        total = 0.0
        for here in strips(len(self.h)):
            later = slice(here.stop, None)
            right = change[:, here] @ self.h[here, here] + 2 * change[:, later] @ self.h[later, here]
            total += float((left[:, here] * right).sum(dtype=torch.float64))
        return 0.5 * self.share * total


def diagonal(matrix: Tensor) -> Tensor:
    """Diagonal of a matrix, or the vector that stands for one."""
    return matrix if matrix.ndim == 1 else matrix.diagonal()
