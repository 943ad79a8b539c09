"""Windows that cover everything there is in a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.clusters import clustered
from assay.methods.select._ngrams import counts


@dataclass(frozen=True)
class KMeans:
    """Cluster windows by their n-grams and draw as many from each cluster, as far as it has them."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement (2024), its k-means"

    clusters: int = 32
    buckets: int = 1_024

    def select(self, pool: Tensor, target: Tensor | None, count: int, seed: int) -> Tensor:
        """See `Selector.select`. Square roots of frequencies are clustered, so that rare n-grams count too."""
        found = counts(pool, self.buckets)
        labels = clustered((found / found.sum(1, keepdim=True)).sqrt(), min(self.clusters, count), seed)
        return evenly(labels, count, seed)


def evenly(labels: Tensor, count: int, seed: int) -> Tensor:
    """Places of `count` members in random order, equally many of each label until it has no more: labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    turn = torch.zeros_like(labels)
    for label in shuffled.unique():
        members = (shuffled == label).nonzero()[:, 0]
        turn[members] = torch.arange(len(members))
    chosen = order[turn.argsort(stable=True)[:count]]
    return chosen[torch.randperm(count, generator=generator)]


METHOD = KMeans
