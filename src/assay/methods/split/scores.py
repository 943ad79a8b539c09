"""Which weights are worth keeping exactly: scores, and the split by a score.

A score is larger where a weight should be kept, float32 [..., out, in].
"""

import torch
from torch import Tensor


def split(score: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each matrix [..., out, in], as a mask; of equal ones those that come first in memory.

    Raises ValueError for a count beyond the matrix.
    """
    flat = score.flatten(-2)
    size = flat.shape[-1]
    if not 0 <= count <= size:
        raise ValueError(f"{count} of {size} weights can't be kept")
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    least = flat.kthvalue(size - count + 1, dim=-1, keepdim=True).values
    above, equal = flat > least, flat == least
    wanted = count - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= wanted))).view(score.shape)


def deviation(weight: Tensor) -> Tensor:
    """Distance from the mean of the matrix, in standard deviations; EasyQuant (2023) keeps what lies beyond 3."""
    mean, spread = weight.mean((-2, -1), keepdim=True), weight.std((-2, -1), keepdim=True)
    return (weight - mean).abs() / spread.clamp_min(torch.finfo(weight.dtype).tiny)


def sensitivity(weight: Tensor, importance: Tensor) -> Tensor:
    """w² / U_jj², what removing a weight costs once the columns after it have made up for it (PB-LLM, 2023).

    importance: 1 / U_jj² [..., in], see `conditional_importance`.
    """
    return weight.square() * importance[..., None, :]


def columns(importance: Tensor, rows: int) -> Tensor:
    """Whole columns by the energy of their inputs, diag H [..., in], as LLM.int8 (2022) and VPTQ (2024) choose them.

    Where a count isn't a multiple of `rows`, the last column is kept in part, its first rows.
    """
    ranks = importance.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return -ranks.float()[..., None, :].expand(*importance.shape[:-1], rows, -1)


def sensitive_or_large(weight: Tensor, fisher: Tensor, count: int, share: float = 0.1) -> Tensor:
    """SqueezeLLM's (2023) two sets as one mask of `count` weights: a share by Fisher information, the rest by size."""
    sensitive = split(fisher, round(share * count))
    return sensitive | split(weight.abs().masked_fill(sensitive, -1), count - round(share * count))
