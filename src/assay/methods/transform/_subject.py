"""What a transform gets and gives: weights with edits, the streams they lie on, and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from assay.measure.damage import Curvature
from assay.methods.base import Method
from assay.model.progress import Progress
from assay.model.streams import Linear, Residual, Streams
from assay.model.weights import Weights

Statistics = Callable[[int | None], Mapping[str, Curvature]]
"""Takes a block, or None for what lies outside the blocks; returns the curvature of each of its sites."""


@dataclass(frozen=True)
class Subject:
    """A model on its way through transforms.

    statistics: None when there is no profile, or when the weights are no longer those that it measured;
    notes: facts for the user, one line each.
    """

    weights: Weights
    streams: Streams
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()

    def measured(self) -> Statistics:
        """The statistics of a transform that says it needs them."""
        if self.statistics is None:
            raise ValueError("a transform that needs statistics was called without")
        return self.statistics

    def noting(self, *notes: str) -> Subject:
        """The same with further facts."""
        return replace(self, notes=(*self.notes, *notes))

    def untied(self, residual: Residual) -> Subject:
        """The same with a head that is a tensor of its own; as it is where the head is one already."""
        if not residual.tied:
            return self
        (head,) = residual.final.readers
        weights = self.weights.edited({}, {residual.head: head.inputs.tensor}, tie_word_embeddings=False)
        grown = self.weights.source.nbytes(self.weights.origin(head.inputs.tensor))
        note = f"{residual.head} is now a tensor of its own beside the embedding: {grown} bytes more"
        return replace(self, weights=weights, streams=replace(self.streams, residual=residual.untied())).noting(note)


def curvatures(readers: Iterable[Linear], statistics: Mapping[str, Curvature]) -> Iterator[Curvature]:
    """One curvature for each distinct input of some matrices; those that nothing was measured of are left out."""
    sites = {reader.site.reads: reader.site for reader in readers if reader.site is not None}
    for site in sites.values():
        if (found := statistics.get(site.name)) is not None:
            yield found


class Transform(Method, Protocol):
    """A method that changes the weights of a model and not its function."""

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """The subject with its weights edited. Raises InputError with the reason where the model rules it out."""
        ...
