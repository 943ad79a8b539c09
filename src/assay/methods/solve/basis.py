"""Eigenvectors of second moments, found in the background."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.solve.curvature import DAMPING, JOINT_INPUT_SHRINKAGE, OUTPUT_SHRINKAGE, damp, diagonal, shrink
from assay.methods.solve.rounded import flatten_batch
from assay.model.threads import started


class Basis(NamedTuple):
    """Of symmetric matrices [..., n, n]."""

    values: Tensor
    """[..., n], none negative"""
    vectors: Tensor
    """[..., n, n], in columns"""


Waiting = Callable[[], Sequence[Basis]]
"""To be called once: they are large, so nothing else holds them."""


def bases(H: Tensor, G: Tensor | None) -> Waiting:
    """Starts on the eigenvectors of H [..., in, in], and of G where outputs depend on each other; returns what waits for them.

    Both shrunken and damped as `learned.pose` does. A thread for each matrix: with several for one the last digits differ, and
    so do codes in the end.
    """
    moments = [(H, JOINT_INPUT_SHRINKAGE), *([] if G is None else [(G, OUTPUT_SHRINKAGE)])]
    flat = [(matrix, amount) for moment, amount in moments for matrix in flatten_batch(moment)]
    wait, count = started(_basis, flat), len(flat) // len(moments)

    def found() -> list[Basis]:
        pairs = wait()
        each = [pairs[n : n + count] for n in range(0, len(pairs), count)]
        return [Basis(*(parts[0][None] if count == 1 else torch.stack(parts) for parts in zip(*p, strict=True))) for p in each]

    return found


def _basis(moment: tuple[Tensor, float]) -> Basis:
    """Of a second moment [n, n], scaled to ones on the diagonal."""
    damped = damp(shrink(*moment), DAMPING)
    loud = diagonal(damped).sqrt()
    values, vectors = torch.linalg.eigh(damped.div_(loud[:, None] * loud))
    return Basis(values.clamp_(min=0), vectors)
