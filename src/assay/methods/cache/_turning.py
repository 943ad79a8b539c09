"""Products of one query with keys that are still at position 0, compiled for CPUs: turned and multiplied, never written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.loops import loop
from assay.model.threads import WORTH_SHARING, spread
from assay.runtime.single import AT_ONCE, add_dots


def turned_dots(query: Tensor, still: Tensor, where: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 [B, H, g, n]: query float32 [B, H, g, D] times keys float32 [B, n, H * D] turned to positions int32 [B, n].

    cos, sin: float32 [positions, pairs]; channel i turns with channel pairs + i, those from 2 * pairs on stay. On a CPU.
    """
    rows, heads, group, _ = query.shape
    out = torch.empty(rows, heads, group, still.shape[1])
    keys = still.unflatten(2, (heads, -1)).contiguous().numpy()
    shared = (query.contiguous().numpy(), keys, where.contiguous().numpy(), cos.numpy(), sin.numpy(), out.numpy())
    order = torch.arange(rows * heads)
    spread(_turned_dots, len(order), shared, (order,), still.numel() * group >= WORTH_SHARING)
    return out


@loop(cache=True)
def _turned_dots(query: Any, still: Any, where: Any, cos: Any, sin: Any, out: Any, order: Any) -> None:
    heads = query.shape[1]
    rows = np.empty((AT_ONCE, query.shape[3]), np.float32)
    for k in range(len(order)):
        b, h = order[k] // heads, order[k] % heads
        for start in range(0, still.shape[1], AT_ONCE):
            end = min(start + AT_ONCE, still.shape[1])
            _turn(still[b], where[b], h, start, end, cos, sin, rows)
            add_dots(query[b, h], rows, query.shape[3], start, end - start, out[b, h])


@njit(nogil=True, cache=True, fastmath={"contract"})
def _turn(keys: Any, where: Any, head: Any, start: Any, end: Any, cos: Any, sin: Any, rows: Any) -> None:
    pairs = cos.shape[1]
    for n in range(start, end):
        x, to, c, s = keys[n, head], rows[n - start], cos[where[n]], sin[where[n]]
        first, second, up, down = x[:pairs], x[pairs : 2 * pairs], to[:pairs], to[pairs : 2 * pairs]
        for i in range(pairs):
            up[i] = first[i] * c[i] - second[i] * s[i]
            down[i] = second[i] * c[i] + first[i] * s[i]
        for i in range(2 * pairs, len(x)):
            to[i] = x[i]
