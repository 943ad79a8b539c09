"""Gumbel noise that is a function of integers, compiled for CPUs; `_evict.hashed` is the same in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.threads import WORTH_SHARING, spread
from assay.runtime.attention import Step
from assay.runtime.single import softmax


def gumbel(step: Step, rows: slice, factor: float, seed: int) -> Tensor:
    """factor * -log(-log(u)), float32 [B, H, g, rows, S], u hashed from the head, the query's place and the slot's; on a CPU."""
    batch, heads = step.keys.shape[:2]
    group = step.query.shape[1] // heads
    queries = step.queries[:, rows]
    out = torch.empty(batch, heads * group, queries.shape[1], step.positions.shape[2])
    shared = (*_facts(step, group, queries), np.float32(factor), seed, out.numpy())
    order = torch.arange(batch * heads * group)
    spread(_gumbel, len(order), shared, (order,), out.numel() >= WORTH_SHARING)
    return out.unflatten(1, (heads, group))


def noisy_sums(step: Step, factor: float, seed: int, temperature: float) -> Tensor:
    """float32 [B, H, S]: attention of one query that sees all, as `Step.column_sums` has it with `gumbel`'s noise; on a CPU."""
    batch, heads = step.keys.shape[:2]
    group, slots = step.query.shape[1] // heads, step.positions.shape[2]
    out = torch.empty(batch, heads, slots)
    found = step.found.detach().numpy() if step.found is not None else None
    cooled = np.float32(1 / temperature)
    head, group, queries, positions, first = _facts(step, group, step.queries)
    _noisy_sums(head, group, queries, positions, first, np.float32(factor), seed, cooled, found, out.numpy())
    return out


def _facts(step: Step, group: int, queries: Tensor) -> tuple[Any, ...]:
    """Number of the first query head, heads of a group, places of queries and slots, and where each text begins."""
    numbers = (x.contiguous().numpy() for x in (queries, step.positions, step.first))
    return ((step.layer * 4096 + step.head) * 64, group, *numbers)


@njit(inline="always")
def _mix(x: Any) -> Any:
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ ((x >> np.uint32(15)) & np.uint32(0x1FFFF)))
    x = np.uint32(x * np.uint32(0x2C1B3C6D))
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(inline="always")
def _spread_bits(x: Any, turn: Any) -> Any:
    return _mix(np.uint32(np.uint32(np.uint32(x) * np.uint32(0x1E3779B1)) + np.uint32(np.uint32(0x5BD1E995) * np.uint32(turn))))


@njit(inline="always")
def _log(x: Any) -> Any:
    """log of a normal float32 above 0, within two units of the last place; arithmetic only, so loops become vectors."""
    bits = np.float32(x).view(np.int32)
    # the fraction in [sqrt(1/2), sqrt(2))
    power = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    y = np.int32(bits - np.int32(power << np.int32(23))).view(np.float32) - np.float32(1)
    z = y * y
    p = np.float32(7.0376836292e-2)
    p = p * y + np.float32(-1.1514610310e-1)
    p = p * y + np.float32(1.1676998740e-1)
    p = p * y + np.float32(-1.2420140846e-1)
    p = p * y + np.float32(1.4249322787e-1)
    p = p * y + np.float32(-1.6668057665e-1)
    p = p * y + np.float32(2.0000714765e-1)
    p = p * y + np.float32(-2.4999993993e-1)
    p = p * y + np.float32(3.3333331174e-1)
    whole = np.float32(np.int32(power))
    tail = p * z * y + whole * np.float32(-2.12194440e-4) - np.float32(0.5) * z
    return y + tail + whole * np.float32(0.693359375)


@njit(nogil=True, cache=True)
def _gumbel(
    head: Any, group: Any, queries: Any, positions: Any, first: Any, factor: Any, seed: Any, out: Any, order: Any
) -> None:
    heads, known = out.shape[1], np.empty(out.shape[3], np.uint32)
    for k in range(len(order)):
        b, h, j = order[k] // heads, order[k] % heads // group, order[k] % group
        _places(positions[b, min(h, positions.shape[1] - 1)], np.int32(first[b]), known)
        mine = np.uint32(_spread_bits(head + h * 64 + j, 1) ^ np.uint32(seed))
        for q in range(queries.shape[1]):
            both = np.uint32(mine ^ _spread_bits(max(queries[b, q] - first[b], 0), 2))
            _row(both, known, factor, out[b, h * group + j, q])


@njit(nogil=True, cache=True)
def _noisy_sums(head: Any, group: Any, queries: Any, positions: Any, first: Any, factor: Any, seed: Any, cooled: Any, found: Any,
                out: Any) -> None:  # fmt: skip
    known, row, share = np.empty(out.shape[2], np.uint32), np.empty(out.shape[2], np.float32), np.float32(1 / group)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            _places(positions[b, min(h, positions.shape[1] - 1)], np.int32(first[b]), known)
            out[b, h] = 0
            for j in range(group):
                mine = np.uint32(_spread_bits(head + h * 64 + j, 1) ^ np.uint32(seed))
                _row(np.uint32(mine ^ _spread_bits(max(queries[b, 0] - first[b], 0), 2)), known, factor, row)
                for t in range(len(row)):
                    row[t] = (found[b, h, j, 0, t] + row[t]) * cooled
                softmax(row)
                for t in range(len(row)):
                    out[b, h, t] += row[t] * share


@njit(nogil=True, cache=True)
def _places(positions: Any, first: Any, to: Any) -> None:
    for t in range(len(positions)):
        to[t] = _spread_bits(max(positions[t] - first, np.int32(0)), 3)


@njit(nogil=True, cache=True)
def _row(both: Any, known: Any, factor: Any, to: Any) -> None:
    """Noise of one query, from what its head and its place gave and what the slots gave."""
    for t in range(len(to)):
        mixed = _mix(_mix(np.uint32(both ^ known[t])))
        u = (np.float32(np.int32(mixed & np.uint32(0x7FFFFF))) + np.float32(0.5)) * np.float32(2.0**-23)
        to[t] = -factor * _log(-_log(u))
