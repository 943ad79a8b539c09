"""The residual stream in another orthonormal basis, in which no channel stands out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.transform._orthogonal import keeping_mean, rotation, times
from assay.methods.transform._subject import Subject
from assay.methods.transform.norm_fold import fold
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.streams import Face, Residual
from assay.model.weights import Edits


@dataclass(frozen=True)
class Rotate:
    """The residual stream turned by a random rotation, after folding the norms.

    Behind an RMSNorm any rotation R is exact: |x R| = |x|. Behind a LayerNorm R must keep the mean, so there it is a
    random one that maps the vector of ones to itself; elsewhere it is a Hadamard matrix with random signs. A tied
    head is given a tensor of its own, since the gains of the final norm go into it.
    """

    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (2024)"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        residual = turnable(subject, "rotate")
        matrix = (keeping_mean if residual.centred else rotation)(residual.width, generator)
        return turn(subject, residual, matrix)


def turnable(subject: Subject, name: str) -> Residual:
    """The residual stream, if a rotation can be folded into what writes and reads it. Raises InputError."""
    residual = subject.streams.need_residual(name)
    if residual.fixed:
        raise InputError(f"{name}: {subject.streams.family} {residual.fixed}; use rotate_heads or permute_channels")
    return residual


def turn(subject: Subject, residual: Residual, matrix: Tensor) -> Subject:
    """Norms folded, the head untied, and every tensor on the residual stream multiplied by `matrix` [width, width]."""
    folded = fold(subject.untied(residual))
    residual = folded.streams.need_residual("rotate")
    biases = [Face(norm.bias, 0) for norm in residual.norms if norm.bias]
    edits = Edits()
    edits.add([*residual.writers, *residual.readers(), *biases], lambda part: times(part, matrix))
    return replace(folded, weights=folded.weights.edited(edits.by_tensor()))


METHOD = Rotate
