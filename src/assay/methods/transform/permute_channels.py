"""Channels in the order of their size, so that groups of neighbours hold channels of one size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from assay.measure.damage import Curvature, diagonal
from assay.methods.transform._subject import Subject, curvatures
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.streams import Face, Linear
from assay.model.weights import Edits


@dataclass(frozen=True)
class PermuteChannels:
    """Hidden channels and channels of the residual stream by falling mean square of their values.

    hidden: within each MLP, expert or mixer; residual: one order for the whole residual stream, where the model has
    one that can be followed. No step rounds: every weight is moved as it is.
    """

    hidden: bool = True
    residual: bool = True
    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    paper: ClassVar[str] = "Accurate Block Quantization in LLMs with Outliers (2024)"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        edits, statistics = Edits(), subject.measured()
        streams = [s for s in subject.streams.inner if s.kind == "hidden"] if self.hidden else []
        for stream in streams:
            sizes = mean_squares(stream.readers, statistics(stream.block))
            _reorder(edits, [*stream.written, *(r.inputs for r in stream.readers)], sizes)
        residual = subject.streams.residual if self.residual else None
        if residual is not None:
            found = [mean_squares(norm.readers, statistics(norm.block)) for norm in residual.norms if norm.block is not None]
            faces = [*residual.vectors, *residual.writers, *residual.readers()]
            _reorder(edits, faces, sum(found, torch.zeros(residual.width)))
        elif self.residual:
            subject = subject.noting(f"the residual stream keeps its order: {subject.streams.family} {subject.streams.refusal}")
        if not streams and residual is None:
            raise InputError(f"permute_channels: {subject.streams.family} has no channels that can be put in another order")
        return replace(subject, weights=subject.weights.edited(edits.by_tensor()))


def falling(sizes: Tensor) -> Tensor:
    """Indices [n] that sort `sizes` [n] from the largest down; equal ones keep their order."""
    return sizes.argsort(descending=True, stable=True)


def mean_squares(readers: Iterable[Linear], statistics: Mapping[str, Curvature]) -> Tensor:
    """Mean square by channel of what some matrices read [n], the mean over channels 1 for each of them.

    Matrices that read the very same values count once; a channel that no token met has 0.
    """
    total = torch.zeros(1)
    for curvature in curvatures(readers, statistics):
        found = diagonal(curvature.h)
        total = total + found / found.mean().clamp_min(1e-30)
    return total


def _reorder(edits: Edits, faces: Iterable[Face], sizes: Tensor) -> None:
    order = falling(sizes)
    if len(order) > 1:
        edits.add(faces, lambda part: part[..., order])


METHOD = PermuteChannels
