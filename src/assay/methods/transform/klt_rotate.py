"""The residual stream in the basis in which every channel has the same mean square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.transform._orthogonal import hadamard, signs
from assay.methods.transform._subject import Subject, curvatures
from assay.methods.transform.norm_fold import gain_of
from assay.methods.transform.rotate import turn, turnable
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.streams import Residual
from assay.model.threads import threads_for


@dataclass(frozen=True)
class KltRotate:
    """The residual stream turned by the eigenvectors of its second moment, then by a Hadamard matrix.

    The second moment is the mean over all norms of that of their normalised inputs, each with the same trace. Its
    mean squares become equal exactly, which a Hadamard matrix alone doesn't do.
    """

    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    paper: ClassVar[str] = "MambaQuant: Quantizing the Mamba Family with Variance Aligned Rotation Methods (2025)"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        residual = turnable(subject, "klt_rotate")
        if residual.centred:
            raise InputError(
                f"klt_rotate: the LayerNorm of {subject.streams.family} subtracts the mean; use rotate, which keeps it"
            )
        if hadamard(residual.width) is None:
            raise InputError(f"klt_rotate: no Hadamard matrix of {residual.width} channels is built here; use rotate")
        return turn(subject, residual, klt(second_moment(subject, residual), generator))


def klt(moment: Tensor, generator: torch.Generator) -> Tensor:
    """R = K S H / √n with K the eigenvectors of `moment` [n, n], S random signs, H Hadamard: diag(Rᵀ moment R) is constant.

    Float64 [n, n]; n must be a size that `hadamard` builds.
    """
    size = len(moment)
    found = hadamard(size)
    if found is None:
        raise ValueError(f"no Hadamard matrix of size {size}")
    with threads_for(0):
        vectors = torch.linalg.eigh(moment.double())[1]
        return (vectors * signs(size, generator)) @ found.double() / size**0.5


def second_moment(subject: Subject, residual: Residual) -> Tensor:
    """Mean over the norms of the second moment of what they normalise, before their gains: [n, n], trace n."""
    total = torch.zeros(residual.width, residual.width, dtype=torch.float64)
    for norm in residual.norms:
        gain = gain_of(norm, subject.weights).double()
        moment = torch.zeros_like(total)
        for curvature in curvatures(norm.readers, subject.measured()(norm.block)):
            h = curvature.h.double()
            moment += curvature.share * (h if h.ndim == 2 else torch.diag(h))
        divisor = torch.where(gain == 0, torch.inf, gain)
        moment /= divisor.outer(divisor)
        if (trace := moment.trace()) > 0:
            total += moment * (residual.width / trace)
    if not total.any():
        raise InputError("klt_rotate: no calibration token met the model's matrices; profile it on other text")
    return total * (residual.width / total.trace())


METHOD = KltRotate
