"""Some channels of a query, on CPUs compiled."""

from __future__ import annotations

from typing import Any

import torch
from numba import njit
from torch import Tensor


def along(index: Tensor, x: Tensor) -> Tensor:
    """index int [B or 1, H, r] for every token of x [B, H, n, D], as torch gathers and scatters: int64 [B, H, n, r]."""
    return index.long()[:, :, None].expand(len(x), -1, x.shape[2], -1)


def at_channels(query: Tensor, index: Tensor) -> Tensor:
    """[B, H, g, D] at index int [B or 1, H, r] of each head -> [B, H, g, r]."""
    if query.device.type != "cpu" or query.dtype != torch.float32 or query.requires_grad:
        return query.gather(3, along(index, query))
    out = torch.empty(*query.shape[:3], index.shape[2])
    _take(query.contiguous().numpy(), index.contiguous().numpy(), out.numpy())
    return out


@njit(nogil=True, cache=True)
def _take(query: Any, index: Any, out: Any) -> None:
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for j in range(out.shape[2]):
                for i in range(out.shape[3]):
                    out[b, h, j, i] = query[b, h, j, index[min(b, len(index) - 1), h, i]]
