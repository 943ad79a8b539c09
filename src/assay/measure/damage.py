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


@dataclass(frozen=True)
class Curvature:
    """Statistics of one site.

    h: [in, in], or [in] for a diagonal; g: [out, out], or [out] for a diagonal; share in (0, 1];
    tokens: how many tokens h and g are averages over; gradient, fisher: [out, in], where they were measured and asked for.
    """

    h: Tensor
    g: Tensor
    share: float
    tokens: int
    gradient: Tensor | None = None
    fisher: Tensor | None = None

    def damage(self, change: Tensor) -> float:
        """Nats per token of a change [out, in], float32."""
        left = change * self.g[:, None] if self.g.ndim == 1 else self.g @ change
        right = change * self.h if self.h.ndim == 1 else change @ self.h
        return 0.5 * self.share * float((left.double() * right.double()).sum())


def diagonal(matrix: Tensor) -> Tensor:
    """Diagonal of a matrix, or the vector that stands for one."""
    return matrix if matrix.ndim == 1 else matrix.diagonal()


def pivots(matrix: Tensor, damping: float = 0.01) -> Tensor:
    """What is left of each diagonal entry once error feedback has used all the others after it.

    The D of the factorisation L D Lᵀ in the order of falling diagonal: with error feedback the expected
    loss of rounding has these in the place of the diagonal (QuIP: 2-Bit Quantization of Large Language
    Models With Guarantees, 2023). matrix: [n, n] or a diagonal [n], float32. Returns [n], float32.
    """
    if matrix.ndim == 1:
        return matrix
    mean = matrix.diagonal().mean().clamp_min(1e-30)
    damped = matrix + damping * mean * torch.eye(len(matrix))
    order = damped.diagonal().argsort(descending=True, stable=True)
    for step in range(12):
        factor, failed = torch.linalg.cholesky_ex(damped[order][:, order].flip(0, 1))
        if not failed:
            result = torch.empty(len(matrix))
            result[order] = factor.diagonal().square().flip(0)
            return result
        damped = damped + damping * 2**step * mean * torch.eye(len(matrix))
    return matrix.diagonal().clone()
