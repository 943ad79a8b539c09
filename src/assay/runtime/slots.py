"""One token for another on CPUs, compiled: which slot goes, and the last one put there. `select` and `Grown` have it in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor


def lowest(score: Tensor, positions: Any, first: Tensor, sinks: int, after: int) -> Tensor:
    """The slot int [B, H, 1] of lowest score [B, H, S], of equals the first; protected ones as in `select.protect`.

    positions: int32 [B, H or 1, room], none empty; first int [B]. All on a CPU.
    """
    found = torch.empty(*score.shape[:2], 1, dtype=torch.long)
    _lowest(score.detach().contiguous().numpy(), positions, first.numpy(), sinks, after, found.numpy())
    return found


def replace_lowest(score: Tensor, positions: Any, first: Tensor, sinks: int, after: int, keys: Any, values: Any) -> Tensor:
    """`lowest`, and the last slot of positions, keys and values [B, H, room, D] put there."""
    found = torch.empty(*score.shape[:2], 1, dtype=torch.long)
    _replace_lowest(score.detach().contiguous().numpy(), positions, first.numpy(), sinks, after, keys, values, found.numpy())
    return found


@njit(nogil=True, cache=True)
def _replace_lowest(score: Any, positions: Any, first: Any, sinks: Any, after: Any, keys: Any, values: Any, to: Any) -> None:
    last = score.shape[2] - 1
    _lowest(score, positions, first, sinks, after, to)
    for b in range(keys.shape[0]):
        for h in range(keys.shape[1]):
            slot = to[b, min(h, to.shape[1] - 1), 0]
            keys[b, h, slot], values[b, h, slot] = keys[b, h, last], values[b, h, last]
        for h in range(positions.shape[1]):
            positions[b, h, to[b, h, 0]] = positions[b, h, last]


@njit(nogil=True, cache=True)
def _lowest(score: Any, positions: Any, first: Any, sinks: Any, after: Any, to: Any) -> None:
    for b in range(score.shape[0]):
        for h in range(score.shape[1]):
            place, own = positions[b, min(h, positions.shape[1] - 1)], score[b, h]
            least, best = np.float32(np.inf), 0
            for t in range(len(own)):
                free = place[t] <= after and place[t] >= first[b] + sinks
                if free and own[t] < least:
                    least, best = own[t], t
            to[b, h, 0] = best


@njit(nogil=True, cache=True)
def move(data: Any, slot: Any, last: Any) -> None:
    """Put slot `last` of data [B, H or 1, room, ...] where `slot` int [B, H or 1, 1] is."""
    for b in range(data.shape[0]):
        for h in range(data.shape[1]):
            data[b, h, slot[b, min(h, slot.shape[1] - 1), 0]] = data[b, h, last]
