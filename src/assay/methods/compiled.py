"""The inner loops of the solvers, compiled for CPUs with numba. Each has its definition in torch beside its caller.

A wave or a descent takes thousands of steps on a few hundred numbers each: in torch that is all overhead.
Work is split over independent matrices or rows, so results don't depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.loops import loop

ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def runs_on(tensor: Tensor) -> bool:
    """Whether the compiled loops take `tensor`; elsewhere the torch definitions do the work."""
    return tensor.device.type == "cpu"


@njit(inline="always")
def stored(x: Any, mode: int) -> Any:
    """x as bf16 (mode 1) or fp16 (mode 2) holds it, ties to even."""
    if mode == 0:
        return x
    bits = np.float32(x).view(np.uint32)
    drop = np.uint32(16 if mode == 1 else 13)
    if mode == 2 and abs(x) < np.float32(2.0**-14):
        return np.float32(np.rint(x * np.float32(2.0**24)) * np.float32(2.0**-24))
    half = np.uint32((1 << (drop - 1)) - 1)
    bits = np.uint32(bits + half + ((bits >> drop) & np.uint32(1)))
    return np.uint32((bits >> drop) << drop).view(np.float32)


@njit(inline="always")
def _snap(value: Any, scale: Any, low: Any, high: Any, fine: bool, mode: int) -> Any:
    """`IntegerGrid.snap` of one weight."""
    code = min(max(np.float32(np.rint(value / scale)), low), high)
    if not fine:
        return code
    error = value - stored(code * scale, mode)
    other = min(max(code + np.sign(error), low), high)
    return other if abs(value - stored(other * scale, mode)) < abs(error) else code


@njit(inline="always")
def _place(target: Any, table: Any) -> Any:
    """How many bounds of a table (see `look_up`) lie below `target`.

    Counted, not bisected: sixteen comparisons that don't wait for each other take less time than four that do.
    """
    width, start = table.shape[1], 0
    if width > 16:
        for last in range(15, width - 1, 16):
            start += np.int64(target > table[1, last])
        width, start = 16, 16 * start
    within = 0
    for j in range(width - 1):
        within += np.int64(target > table[1, start + j])
    return start + within


@njit(inline="always")
def look_up(value: Any, scale: Any, table: Any, fine: bool, mode: int) -> Any:
    """`TableGrid.snap` of one weight: its step.

    table: float32 [2, 2^n], the steps in rising order, and for each the largest number that is nearer to
    it than to the next one; past the last step that step again, and infinity from it on.
    """
    place = _place(value / scale, table)
    step = table[0, place]
    if not fine:
        return step
    error = value - stored(step * scale, mode)
    beside = place + 1 if error * scale > 0 else place - 1
    other = table[0, min(max(beside, 0), table.shape[1] - 1)]
    return other if abs(value - stored(other * scale, mode)) < abs(error) else step


@njit(inline="always")
def step_of(value: Any, scale: Any, low: Any, high: Any, fine: bool, mode: int, table: Any) -> Any:
    """`Grid.snap` of one weight; which branch it is numba knows when it compiles."""
    if table is None:
        return _snap(value, scale, low, high, fine, mode)
    else:
        return look_up(value, scale, table, fine, mode)


@loop(cache=True)
def round_tiles(fine: bool, mode: int, table: Any, values: Any, rows: Any, columns: Any, scale: Any, low: Any, high: Any,
                errors: Any, centred: Any) -> None:  # fmt: skip
    """Two-sided feedback inside tiles [tiles, t, t], weight by weight; `values` end as the targets.

    rows: A^T, columns: U of each tile, see `wavefront`; table: None or see `look_up`.
    """
    tiles, size, _ = values.shape
    moved = np.empty(size, dtype=np.float32)
    for n in range(tiles):
        for a in range(size):
            for b in range(size):
                present = values[n, a, b]
                code = step_of(present, scale[n, a, b], low[n, a, b], high[n, a, b], fine, mode, table)
                error = (present - stored(code * scale[n, a, b], mode)) / (rows[n, a, a] * columns[n, b, b])
                errors[n, a, b], centred[n, a, b] = error, code
                for k in range(b + 1, size):
                    values[n, a, k] -= rows[n, a, a] * error * columns[n, b, k]
            moved[:] = 0
            for b in range(size):
                for k in range(b, size):
                    moved[k] += errors[n, a, b] * columns[n, b, k]
            for below in range(a + 1, size):
                for k in range(size):
                    values[n, below, k] -= rows[n, below, a] * moved[k]


@loop(cache=True)
def descend_block(fine: bool, mode: int, table: Any, start: int, stop: int, inputs: Any, outputs: Any, through: Any,
                  gradient: Any, scale: Any, low: Any, high: Any, centred: Any, levels: Any) -> None:  # fmt: skip
    """Coordinate descent through columns start..stop of each matrix, one weight after another.

    All [matrices, in, out] but inputs [matrices, in, in] and outputs [matrices, out, out];
    gradient [matrices, stop - start, out] is (G D H)^T of the block, through (G D)^T; both are kept exact.
    table: None or see `look_up`.
    """
    for n in range(len(levels)):
        pushed, heavy = np.zeros(levels.shape[2], dtype=np.float32), np.diag(outputs[n])
        for j in range(start, stop):
            slope = gradient[n, j - start]
            moves = 0
            pushed[:] = 0
            for i in range(levels.shape[2]):
                curvature = heavy[i] * inputs[n, j, j]
                spacing, present = scale[n, j, i], levels[n, j, i]
                code = step_of(present + slope[i] / curvature, spacing, low[n, j, i], high[n, j, i], fine, mode, table)
                if code == centred[n, j, i]:
                    continue
                level = stored(code * spacing, mode)
                step = level - present
                if (curvature * step * np.float32(0.5) - slope[i]) * step >= 0:
                    continue
                centred[n, j, i], levels[n, j, i] = code, level
                moves += 1
                push = step * inputs[n, j, j]
                beside = outputs[n, i]
                later, rest = slope[i + 1 :], beside[i + 1 :]  # rows before it have had their turn
                for k in range(len(pushed)):
                    pushed[k] += step * beside[k]
                for k in range(len(later)):
                    later[k] -= push * rest[k]
            if moves:
                for k in range(len(pushed)):
                    through[n, j, k] -= pushed[k]
                for later in range(j + 1, stop):
                    for k in range(len(pushed)):
                        gradient[n, later - start, k] -= inputs[n, later, j] * pushed[k]


@loop(cache=True)
def feed_rows(fine: bool, mode: int, table: Any, upper: Any, values: Any, scale: Any, low: Any, high: Any, errors: Any,
              steps: Any) -> None:  # fmt: skip
    """Error feedback along rows [rows, columns] of one block of columns, see `column_feedback`; `values` end as the targets.

    upper: U of the block [columns, columns]; table: None or see `look_up`.
    """
    rows, width = values.shape
    for r in range(rows):
        for k in range(width):
            present = values[r, k]
            code = step_of(present, scale[r, k], low[r, k], high[r, k], fine, mode, table)
            error = (present - stored(code * scale[r, k], mode)) / upper[k, k]
            errors[r, k], steps[r, k] = error, code
            for j in range(k + 1, width):
                values[r, j] -= error * upper[k, j]


@loop(cache=True)
def nearest_errors(top: float, fine: bool, mode: int, weight: Any, scales: Any, zeros: Any, errors: Any) -> None:
    """`IntegerGrid.squared_errors` of rows of weights [rows, in]; scales and zeros [rows, groups]."""
    size = weight.shape[1] // scales.shape[1]
    for r in range(len(weight)):
        for g in range(scales.shape[1]):
            scale, low = scales[r, g], -zeros[r, g]
            for k in range(g * size, (g + 1) * size):
                away = _snap(weight[r, k], scale, low, top + low, fine, mode) * scale - weight[r, k]
                errors[r, k] = away * away


@loop(cache=True)
def clip_search(top: float, symmetric: bool, fine: bool, mode: int, least: float, huge: float, shrinks: Any, cost: Any,
                groups: int, weight: Any, costs: Any, scales: Any, zeros: Any) -> None:  # fmt: skip
    """`IntegerGrid.fit_clipped` of rows of weights [rows, in]; fills scales and zeros [rows, groups].

    The cost of a squared error is costs [rows, in], or cost [in] for all rows if costs has no columns.
    """
    size = weight.shape[1] // groups
    for r in range(len(weight)):
        for g in range(groups):
            part = weight[r, g * size : (g + 1) * size]
            price = costs[r, g * size : (g + 1) * size] if costs.shape[1] else cost[g * size : (g + 1) * size]
            scale, zero, _ = _searched(top, symmetric, fine, mode, least, huge, shrinks, part, price)
            scales[r, g], zeros[r, g] = scale, np.uint8(zero)


@loop(cache=True)
def clip_costs(top: float, symmetric: bool, fine: bool, mode: int, least: float, huge: float, shrinks: Any, cost: Any,
               other: Any, groups: int, weight: Any, plain: Any, clipped: Any) -> None:  # fmt: skip
    """`IntegerGrid.row_costs` of rows of weights [rows, in]; cost, other: [in]; fills plain and clipped [rows]."""
    size = weight.shape[1] // groups
    for r in range(len(weight)):
        whole, best = 0.0, 0.0
        for g in range(groups):
            part, price = weight[r, g * size : (g + 1) * size], cost[g * size : (g + 1) * size]
            scale, zero, first = _searched(top, symmetric, fine, mode, least, huge, shrinks, part, price)
            whole += first
            best += _weighed(top, fine, mode, scale, zero, part, other[g * size : (g + 1) * size])
        plain[r], clipped[r] = whole, best


@njit(inline="always")
def _searched(top: Any, symmetric: Any, fine: Any, mode: Any, least: Any, huge: Any, shrinks: Any, part: Any, price: Any) -> Any:
    """Scale and zero point of one group with the smallest weighted error, and the error of the first of `shrinks`."""
    low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
    best, first = np.float32(np.inf), np.float32(0)
    best_scale, best_zero = np.float32(1), np.float32(0)
    for attempt in range(len(shrinks) + (0 if symmetric else 2)):
        if attempt < len(shrinks):
            factor = shrinks[attempt]
            if symmetric:
                scale = _scale(factor * max(high, -low) / (top * np.float32(0.5)), least, huge, mode)
                zero = np.float32((top + 1) / 2)
            else:
                scale = _scale((factor * high - factor * low) / top, least, huge, mode)
                zero = min(max(np.float32(np.rint(-factor * low / scale)), np.float32(0)), top)
            centre = zero
        else:
            if attempt == len(shrinks):
                centre = best_zero
            scale = best_scale
            zero = min(max(centre + np.float32(2 * (attempt - len(shrinks)) - 1), np.float32(0)), top)
        error = _weighed(top, fine, mode, scale, zero, part, price)
        if attempt == 0:
            first = error
        if error < best:
            best, best_scale, best_zero = error, scale, zero
    return best_scale, best_zero, first


@njit(inline="always")
def _weighed(top: Any, fine: Any, mode: Any, scale: Any, zero: Any, part: Any, price: Any) -> Any:
    """Weighted squared error of rounding one group to nearest."""
    error = np.float32(0)
    for k in range(len(part)):
        away = _snap(part[k], scale, -zero, top - zero, fine, mode) * scale - part[k]
        error += away * away * price[k]
    return error


@njit(inline="always")
def _scale(wanted: Any, least: Any, huge: Any, mode: int) -> Any:
    if not wanted > 0:
        wanted = np.float32(1)
    return stored(min(max(np.float32(wanted), least), huge), mode)


@loop(cache=True)
def scale_search(fine: bool, mode: int, table: Any, cost: Any, weight: Any, costs: Any, trials: Any, best: Any,
                 free: Any) -> None:  # fmt: skip
    """The search of `TableGrid.fit_clipped` in rows of weights [rows, in]; fills best and free [rows, groups].

    trials: [rows, trials, groups], scales. best: that with the smallest weighted error, free: the least-squares
    scale of its codes. The cost of a squared error is costs [rows, in], or cost [in] if costs has no columns.
    """
    groups = trials.shape[2]
    size = weight.shape[1] // groups
    target, steps = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.float32)
    for r in range(len(weight)):
        for g in range(groups):
            part = weight[r, g * size : (g + 1) * size]
            price = costs[r, g * size : (g + 1) * size] if costs.shape[1] else cost[g * size : (g + 1) * size]
            least, best[r, g], free[r, g] = np.float32(np.inf), trials[r, 0, g], trials[r, 0, g]
            for t in range(trials.shape[1]):
                scale = trials[r, t, g]
                if fine:
                    for k in range(size):
                        steps[k] = look_up(part[k], scale, table, fine, mode)
                else:
                    for k in range(size):
                        target[k] = part[k] / scale
                    _steps(target, table, steps)
                error, along, length = np.float32(0), np.float32(0), np.float32(0)
                for k in range(size):
                    away = stored(steps[k] * scale, mode) - part[k]
                    error += away * away * price[k]
                    along += steps[k] * part[k] * price[k]
                    length += steps[k] * steps[k] * price[k]
                if error < least:
                    least, best[r, g] = error, scale
                    free[r, g] = along / length if length > 0 else scale


@njit(inline="always")
def _steps(target: Any, table: Any, steps: Any) -> None:
    """The step of each target. In a small table the loop over the targets is the inner one: it becomes vector code."""
    if table.shape[1] > 32:
        for k in range(len(target)):
            steps[k] = table[0, _place(target[k], table)]
        return
    steps[:] = table[0, 0]
    for j in range(table.shape[1] - 1):
        bound, step = table[1, j], table[0, j + 1]
        for k in range(len(target)):
            steps[k] = step if target[k] > bound else steps[k]
