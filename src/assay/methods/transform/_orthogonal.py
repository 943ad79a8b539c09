"""Orthogonal matrices: Hadamard matrices, random rotations, and rotations that keep the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.model.threads import threads_for

AT_ONCE = 1 << 22


def times(part: Tensor, matrix: Tensor) -> Tensor:
    """`part` [..., n] times `matrix` [n, n] in float64, rounded once to the dtype of `part`."""
    rows, wide = part.reshape(-1, part.shape[-1]), matrix.double()
    pieces = rows.split(max(1, AT_ONCE // rows.shape[1]))
    return torch.cat([(piece.double() @ wide).to(part.dtype) for piece in pieces]).view(part.shape)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix [size, size] of ones and minus ones, float32; None for a size that isn't built here.

    Doubling (Sylvester, 1867) of a matrix from the squares modulo a prime q, q = 3 mod 4 (Paley, On Orthogonal
    Matrices, 1933): every size 2^a (q + 1) there is, which covers the widths of most models.
    """
    core, doublings = size, 0
    while core > 2:
        if core % 4 == 0 and _prime(core - 1):
            break
        if core % 2:
            return None
        core, doublings = core // 2, doublings + 1
    matrix = _paley(core - 1) if core > 2 else torch.tensor([[1.0, 1.0], [1.0, -1.0]])[:core, :core]
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """Random signs, then a Hadamard matrix, [size, size], float64; a random one for sizes without a Hadamard matrix."""
    found = hadamard(size)
    if found is None:
        return orthogonal(size, generator)
    return signs(size, generator)[:, None] * found.double() / size**0.5


def keeping_mean(size: int, generator: torch.Generator) -> Tensor:
    """A random rotation that maps the vector of ones to itself, so that it commutes with subtracting the mean; float64."""
    axis = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    axis[0] += 1
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.square().sum().clamp_min(1e-300)
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(size - 1, generator))
    with threads_for(0):
        return reflection @ inner @ reflection


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], float64, without a preferred direction."""
    with threads_for(0):
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def signs(size: int, generator: torch.Generator) -> Tensor:
    """Random ones and minus ones [size], float32."""
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1


def _paley(q: int) -> Tensor:
    """Paley's first construction, [q + 1, q + 1]."""
    symbol = -torch.ones(q)
    symbol[torch.arange(1, q).square() % q] = 1
    symbol[0] = 0
    place = torch.arange(q)
    skew = torch.zeros(q + 1, q + 1)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = symbol[(place[:, None] - place[None]) % q]
    return skew + torch.eye(q + 1)


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
