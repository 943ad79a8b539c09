"""Orthogonal matrices that spread every input over all others: random signs, then Hadamard.

Sizes that are no power of two take the discrete Hartley transform of their odd part: also real, symmetric and
orthogonal, and made from a formula. Only the seed of the signs is stored. (Incoherence processing: QuIP:
2-Bit Quantization of Large Language Models With Guarantees, 2023; QuaRot, 2024.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def signs(size: int, seed: int) -> Tensor:
    """Random signs int8 [size] from a 64-bit mix of seed and place, the same in every version of every library."""
    mixed = (torch.arange(size) + size * (seed + 1)) * 0x5851F42D4C957F2D + 0x14057B7EF767814F
    mixed = (mixed ^ (mixed >> 33)) * 0x2545F4914F6CDD1D
    return torch.where((mixed >> 40) & 1 == 1, 1, -1).to(torch.int8)


def rotate(weight: Tensor, seed: int = 0) -> Tensor:
    """W R for a weight [..., in]: the same layer for inputs x R, with R = diag(signs) times the transform. float32."""
    return _transformed(weight.double() * signs(weight.shape[-1], seed)).float()


def unrotate(weight: Tensor, seed: int = 0) -> Tensor:
    """Inverse of `rotate`."""
    return (_transformed(weight.double()) * signs(weight.shape[-1], seed)).float()


def rotate_both(moment: Tensor, seed: int = 0) -> Tensor:
    """R^T H R for a second moment H [..., n, n] of inputs."""
    return rotate(rotate(moment, seed).mT, seed)


def _transformed(rows: Tensor) -> Tensor:
    """Rows [..., n] float64 times Hartley (of the odd part of n) x Hadamard (of the even part); its own inverse."""
    size = rows.shape[-1]
    even = size & -size
    cells = rows.reshape(-1, size // even, even)
    width = 1
    while width < even:
        pairs = cells.unflatten(-1, (-1, 2, width))
        cells = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        width *= 2
    return ((_hartley(size // even) @ cells) / even**0.5).reshape(rows.shape)


def _hartley(size: int) -> Tensor:
    """[size, size] float64, orthogonal and symmetric."""
    places = torch.arange(size)
    turns = 2 * torch.pi * (places[:, None] * places % size).double() / size
    return (turns.cos() + turns.sin()) / size**0.5
