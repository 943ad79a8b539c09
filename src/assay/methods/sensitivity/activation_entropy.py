"""How many different things a block says: the entropy of its clustered outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.clusters import clustered
from assay.methods.sensitivity._hidden import states
from assay.methods.sensitivity._subject import Scores, Subject


@dataclass(frozen=True)
class ActivationEntropy:
    """Entropy in bits of a block's output vectors over `clusters` clusters of k-means, from several starts."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "LUQ: Layerwise Ultra-Low Bit Quantization for Multimodal Large Language Models (2025)"
    prices: ClassVar[bool] = False
    samples: ClassVar[str] = "starts of k-means"
    whole_blocks: ClassVar[bool] = True

    clusters: int = 100
    starts: int = 4

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Between 0 and log2 of `clusters`."""
        seeds = [subject.seed * self.starts + i for i in range(self.starts)]
        rows = [
            torch.tensor([entropy(after.flatten(0, 1), self.clusters, seed) for seed in seeds], dtype=torch.float64)
            for _, after in states(subject)
        ]  # fmt: skip
        return subject.alike_in_blocks(torch.stack(rows))


def entropy(vectors: Tensor, clusters: int, seed: int) -> float:
    """Bits of the cluster that a vector of [n, width] falls into, k-means++ from a seed."""
    labels = clustered(vectors, clusters, seed)
    shares = torch.bincount(labels).double() / len(vectors)
    return float(-torch.special.xlogy(shares, shares).sum() / math.log(2))


METHOD = ActivationEntropy
