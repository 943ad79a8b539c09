"""Scalar codebooks: the best 2^b values for the weights of a row, exactly.

In one dimension the clusters of an optimal weighted k-means are intervals of the sorted values, so dynamic
programming finds the optimum that Lloyd's iterations may miss (Wang and Song, Ckmeans.1d.dp, 2011). The last
interval's best start never moves left as its end moves right, so each layer of the table is filled by halving.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.threads import spread


def fit(values: Tensor, importance: Tensor, size: int) -> Tensor:
    """The `size` values that minimise the weighted squared distance to the nearest, row by row.

    values, importance: float32 [..., n], importance not negative; a row whose importance is 0 counts as all ones.
    Returns float32 [..., size], rising; where a row has fewer distinct values, the last one is repeated.
    """
    shape = values.shape
    flat, order = values.reshape(-1, shape[-1]).sort(-1)
    price = importance.expand(shape).reshape(flat.shape)
    price = torch.where(price.sum(-1, keepdim=True) > 0, price, torch.ones_like(price)).gather(-1, order)
    table = torch.empty(len(flat), size)
    spread(_fit, len(flat), (), (flat.float().contiguous(), price.float().contiguous(), table))
    return table.view(*shape[:-1], size)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index (uint8) of the entry of a rising table [..., size] nearest to each value [..., n], the lower of two."""
    middles = (table[..., 1:] + table[..., :-1]) / 2
    return torch.searchsorted(middles.contiguous(), values.contiguous()).to(torch.uint8)


class RowTables:
    """Column quantizer with a table of its own for each row."""

    def __init__(self, table: Tensor, columns: int) -> None:
        """table: float32 [batch, out, size], rising."""
        self.table = table
        self.codes = torch.empty(len(table), columns, table.shape[1], dtype=torch.uint8)

    def __call__(self, column: int, values: Tensor) -> Tensor:
        self.codes[:, column] = nearest(values[..., None], self.table)[..., 0]
        return self.table.gather(-1, self.codes[:, column, :, None].long())[..., 0]


@njit(nogil=True, cache=True)
def _fit(values: Any, importance: Any, table: Any) -> None:
    for r in range(len(values)):
        _fit_row(values[r], importance[r], table[r])


@njit(nogil=True, cache=True)
def _fit_row(values: Any, importance: Any, table: Any) -> None:
    """Optimal centres of sorted values. Equal values and those without importance are merged first."""
    points, mass = np.empty(len(values)), np.empty(len(values))
    count = 0
    for i in range(len(values)):
        if importance[i] <= 0:
            continue
        if count and points[count - 1] == values[i]:
            mass[count - 1] += importance[i]
        else:
            points[count], mass[count] = values[i], importance[i]
            count += 1
    size = len(table)
    if count <= size:
        for k in range(size):
            table[k] = points[min(k, count - 1)]
        return
    # sums of importance, of the first and of the second moment about the middle, which keeps digits
    sums = np.zeros((3, count + 1))
    middle = points[count // 2]
    for i in range(count):
        away = points[i] - middle
        sums[0, i + 1] = sums[0, i] + mass[i]
        sums[1, i + 1] = sums[1, i] + mass[i] * away
        sums[2, i + 1] = sums[2, i] + mass[i] * away * away
    starts = np.zeros((size, count), dtype=np.int32)
    before, now = np.empty(count), np.empty(count)
    for end in range(count):
        before[end] = _cost(sums, 0, end)
    for k in range(1, size):
        _fill(sums, before, now, starts[k], k, count)
        before, now = now, before
    end = count - 1
    for k in range(size - 1, -1, -1):
        start = starts[k, end] if k else 0
        held = sums[0, end + 1] - sums[0, start]
        table[k] = middle + (sums[1, end + 1] - sums[1, start]) / held if held > 0 else points[start]
        end = start - 1


@njit(inline="always")
def _cost(sums: Any, start: int, end: int) -> Any:
    """Weighted squared distance of points start..end to their mean."""
    held, first = sums[0, end + 1] - sums[0, start], sums[1, end + 1] - sums[1, start]
    # an importance that vanishes beside the sum before it leaves nothing held
    return max(sums[2, end + 1] - sums[2, start] - first * first / held, 0.0) if held > 0 else 0.0


@njit(nogil=True, cache=True)
def _fill(sums: Any, before: Any, now: Any, starts: Any, k: int, count: int) -> None:
    """now[end] = min over start of before[start - 1] + cost(start..end), for ends from k on, by divide and conquer."""
    stack = np.empty((64, 4), dtype=np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = k, count - 1, k, count - 1
    depth = 1
    while depth:
        depth -= 1
        low, high, first, last = stack[depth]
        end = (low + high) // 2
        best, at = np.inf, first
        for start in range(first, min(last, end) + 1):
            cost = before[start - 1] + _cost(sums, start, end)
            if cost < best:
                best, at = cost, start
        now[end], starts[end] = best, at
        if low < end:
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = low, end - 1, first, at
            depth += 1
        if end < high:
            stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = end + 1, high, at, last
            depth += 1
