"""Attention of one query to some slots only, on CPUs, compiled: rows are read where they lie. `Lane` has it in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.loops import loop
from assay.model.threads import WORTH_SHARING, spread
from assay.runtime.grown import array_of
from assay.runtime.single import AT_ONCE, Sight, Source, add_dots, add_rows, weigh
from assay.runtime.unpacking import flat, place, read_row


def attend_picked(query: Tensor, picked: Tensor, sight: Sight, key: Tensor, value: Tensor, keys: Source, values: Source,
                  slots: int) -> Tensor:  # fmt: skip
    """Append the last of `slots` and attend to the picked ones, int [B, H, k]: float32 [B, Hq, 1, D]; nothing is stored as codes.

    query float32 [B, Hq, 1, D]; key, value [B, H, 1, D]: of the last slot.
    """
    rows, heads = query.shape[:2]
    out = np.empty((rows, heads, value.shape[3]), np.float32)
    shared = (query.detach().numpy().reshape(rows, heads, -1), picked.contiguous().numpy(), sight, array_of(key), array_of(value),
              keys.exact, values.exact, keys.half, slots, out)  # fmt: skip
    count = rows * key.shape[1]
    spread(_attend, count, shared, (torch.arange(count),), picked.numel() * query.shape[3] >= WORTH_SHARING)
    return torch.from_numpy(out)[:, :, None]


def guesses(query: Tensor, channels: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Mean query of each group at some channels times labels, float32 [B, H, S]; minus infinity for empty slots.

    query float32 [B, Hq, 1, D]; channels int [H, r]; labels float32 [B, H, S, r]; positions int32 [B, H or 1, S].
    """
    out = torch.empty(labels.shape[:3])
    asked = query.detach().contiguous().numpy()[:, :, 0]
    _guesses(asked, channels.numpy(), *flat(labels.detach()), *flat(positions), positions.shape[1] == 1, out.numpy())
    return out


@loop(cache=True)
def _attend(query: Any, picked: Any, sight: Any, key: Any, value: Any, keys: Any, values: Any, half: Any, slots: Any, out: Any,
            order: Any) -> None:  # fmt: skip
    heads, count = picked.shape[1], picked.shape[2]
    group = query.shape[1] // heads
    rows = np.zeros((AT_ONCE, max(keys.shape[3], values.shape[3])), np.float32)
    weights, sums = np.empty((group, count), np.float32), np.empty((group, out.shape[2]), np.float32)
    spots = np.empty(count, np.int32)
    for k in range(len(order)):
        b, h = order[k] // heads, order[k] % heads
        mine, own = slice(h * group, (h + 1) * group), picked[b, h]
        for i in range(keys.shape[3]):
            keys[b, h, slots - 1, i] = key[b, h, 0, i]
        for i in range(values.shape[3]):
            values[b, h, slots - 1, i] = value[b, h, 0, i]
        for n in range(count):
            spots[n] = sight.positions[b, min(h, sight.positions.shape[1] - 1), own[n]]
        for start in range(0, count, AT_ONCE):
            end = min(start + AT_ONCE, count)
            _fetch(keys[b, h], own[start:end], half, rows)
            add_dots(query[b, mine], rows, keys.shape[3], start, end - start, weights)
        for j in range(group):
            for n in range(count):
                weights[j, n] *= np.float32(sight.scaling)
            if sight.softcap > 0:
                for n in range(count):
                    weights[j, n] = np.float32(np.tanh(weights[j, n] / sight.softcap) * sight.softcap)
            weigh(weights[j], spots, sight, b)
        sums[:] = 0
        for start in range(0, count, AT_ONCE):
            end = min(start + AT_ONCE, count)
            _fetch(values[b, h], own[start:end], half, rows)
            add_rows(weights, rows, start, end - start, sums)
        out[b, mine] = sums


@njit(nogil=True, cache=True)
def _fetch(x: Any, places: Any, half: Any, rows: Any) -> None:
    for n in range(len(places)):
        read_row(x[places[n]], half, rows[n])


@loop(cache=True)
def _guesses(query: Any, channels: Any, labels: Any, lp: Any, positions: Any, pp: Any, shared: Any, out: Any) -> None:
    heads, width = channels.shape
    group = query.shape[1] // heads
    asked = np.empty(width, np.float32)
    for b in range(len(out)):
        for h in range(heads):
            for i in range(width):
                total = np.float32(0)
                for j in range(group):
                    total += query[b, h * group + j, channels[h, i]]
                asked[i] = total / np.float32(group)
            for t in range(out.shape[2]):
                begin, total = place(lp, b, h, t), np.float32(0)
                row = labels[begin : begin + width]
                for i in range(width):
                    total += asked[i] * row[i]
                there = positions[place(pp, b, 0 if shared else h, t)] >= 0
                out[b, h, t] = total if there else np.float32(-np.inf)
