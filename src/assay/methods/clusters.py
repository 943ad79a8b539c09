"""k-means: SciPy's, from k-means++ starting points."""

from __future__ import annotations

import warnings

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor


def clustered(vectors: Tensor, clusters: int, seed: int) -> Tensor:
    """Cluster of each of the vectors [n, width], float32 -> int64 [n].

    Fewer clusters than asked for where there are fewer different vectors.
    """
    starts = plus_plus(vectors, clusters, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        _, labels = kmeans2(vectors.numpy(), starts.numpy(), minit="matrix", missing="warn")
    return torch.from_numpy(labels).long()


def plus_plus(vectors: Tensor, clusters: int, seed: int) -> Tensor:
    """Starting points [clusters or fewer, width], each drawn by its squared distance from those before.

    k-means++: The Advantages of Careful Seeding (2007). No point is drawn twice.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = [int(torch.randint(len(vectors), (1,), generator=generator))]
    nearest = (vectors - vectors[picked[0]]).double().square().sum(-1)
    while len(picked) < clusters and float(nearest.max()) > 0:
        picked.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (vectors - vectors[picked[-1]]).double().square().sum(-1))
    return vectors[picked]
