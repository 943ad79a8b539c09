"""Steps of learned rounding, every weight alone, compiled for CPUs with numba. Definitions in torch are beside their callers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from assay.methods.compiled import step_of, stored
from assay.model.loops import loop

TINY = np.float32(1e-30)


@loop(cache=True)
def round_offsets(fine: bool, mode: int, table: Any, weight: Any, width: Any, offset: Any, scale: Any, low: Any, high: Any,
                  centred: Any, levels: Any) -> None:  # fmt: skip
    """Round rows of weights [rows, in] with their offsets, in steps of `width`; scale, low, high [rows, groups]."""
    size = weight.shape[1] // scale.shape[1]
    for r in range(len(weight)):
        for g in range(scale.shape[1]):
            own, each = slice(g * size, (g + 1) * size), scale[r, g]
            _round(fine, mode, table, each, low[r, g], high[r, g], weight[r, own], width[r, own], offset[r, own], centred[r, own])
            level, steps = levels[r, own], centred[r, own]
            for k in range(len(level)):
                level[k] = stored(steps[k] * each, mode)


@loop()
def _round(fine: bool, mode: int, table: Any, scale: Any, low: Any, high: Any, weight: Any, width: Any, offset: Any,
           steps: Any) -> None:  # fmt: skip
    for k in range(len(weight)):
        steps[k] = step_of(weight[k] + offset[k] * width[k] * abs(scale), scale, low, high, fine, mode, table)


@loop(cache=True)
def move_offsets(rate: Any, two_ends: bool, weight: Any, width: Any, offset: Any, centred: Any, gradient: Any, scale: Any,
                 low: Any, high: Any, up: Any, down: Any) -> None:  # fmt: skip
    """Fill the slopes of ranges, up and down [rows, groups], and move the offsets."""
    size = weight.shape[1] // scale.shape[1]
    for r in range(len(weight)):
        for g in range(scale.shape[1]):
            own, each, least, most = slice(g * size, (g + 1) * size), scale[r, g], low[r, g], high[r, g]
            slope, moved = gradient[r, own], offset[r, own]
            inside, above, below, outside = _slopes(
                each, least, most, weight[r, own], width[r, own], moved, centred[r, own], slope
            )
            for k in range(len(moved)):
                step = rate if slope[k] > 0 else -rate if slope[k] < 0 else np.float32(0)
                moved[k] = min(max(moved[k] + step, np.float32(-0.5)), np.float32(0.5))
            if two_ends:
                up[r, g], down[r, g] = inside / (most - least) + above, inside / (most - least) - below
            else:
                up[r, g], down[r, g] = (inside + outside) * np.sign(each), np.float32(0)


@loop()
def _slopes(scale: Any, low: Any, high: Any, weight: Any, width: Any, offset: Any, steps: Any, gradient: Any) -> Any:
    """Sums over a group of gradients: times what rounding added within the range, above it, below it, times steps beyond it."""
    zero = np.float32(0)
    inside, above, below, outside = zero, zero, zero, zero
    for k in range(len(weight)):
        exact, pull = weight[k] / scale, gradient[k]
        wanted = (weight[k] + offset[k] * width[k] * abs(scale)) / scale
        over, under = wanted > high, wanted < low
        beyond = over | under
        inside += zero if beyond else pull * (steps[k] - exact)
        above += pull if over else zero
        below += pull if under else zero
        outside += pull * steps[k] if beyond else zero
    return inside, above, below, outside


@njit(inline="always")
def _exp2(x: Any) -> Any:
    """2^x of a float32 to six digits, by operations that become vector code."""
    x = min(max(x, np.float32(-126)), np.float32(126))
    whole = np.rint(x)
    y = (x - whole) * np.float32(0.6931472)
    series = np.float32(1 / 120) + y * np.float32(1 / 720)
    series = np.float32(1 / 6) + y * (np.float32(1 / 24) + y * series)
    series = np.float32(1) + y * (np.float32(1) + y * (np.float32(0.5) + y * series))
    return series * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def _log2(x: Any) -> Any:
    """log2 of a positive normal float32 to six digits."""
    bits = np.float32(x).view(np.int32)
    shifted = np.int32(bits - np.int32(0x3F3504F3))  # mantissas from 1/sqrt 2 to sqrt 2
    exponent = np.int32(shifted >> np.int32(23))
    mantissa = np.int32(bits - np.int32(exponent << np.int32(23))).view(np.float32)
    z = (mantissa - np.float32(1)) / (mantissa + np.float32(1))
    square = z * z
    series = np.float32(1 / 5) + square * (np.float32(1 / 7) + square * np.float32(1 / 9))
    series = np.float32(1) + square * (np.float32(1 / 3) + square * series)
    return np.float32(exponent) + np.float32(2.8853900) * z * series


@njit(inline="always")
def _sigmoid(x: Any) -> Any:
    return np.float32(1) / (np.float32(1) + _exp2(x * np.float32(-1.442695)))


@loop(cache=True)
def move_gates(ends: Any, moments: Any, lengths: Any, beta: Any, force: Any, gradient: Any, bottom: Any, width: Any,
               free: Any, mean: Any, square: Any, levels: Any) -> None:  # fmt: skip
    """A step of Adam on rows of gates [rows, in], and the levels they then give; see `adaround.move`."""
    lowest, span = ends[0], ends[1] - ends[0]
    zero, one = np.float32(0), np.float32(1)
    soft, slope = np.empty(free.shape[1], dtype=np.float32), np.empty(free.shape[1], dtype=np.float32)
    for r in range(len(free)):
        # Short loops over few arrays: only those become vector code.
        _sigmoids(free[r], soft)
        for k in range(len(soft)):
            stretched = soft[k] * span + lowest
            side = stretched + stretched - one
            push = force * _exp2((beta - one) * _log2(max(abs(side), TINY)))
            within = soft[k] * (one - soft[k]) if abs(side) <= one else zero
            slope[k] = (-gradient[r, k] - (push if side > zero else -push)) * within
        _adam(slope, mean[r], square[r], moments, lengths)
        for k in range(len(soft)):
            free[r, k] -= slope[k]
        _sigmoids(free[r], soft)
        for k in range(len(soft)):
            levels[r, k] = bottom[r, k] + min(max(soft[k] * span + lowest, zero), one) * width[r, k]


@loop()
def _sigmoids(free: Any, soft: Any) -> None:
    for k in range(len(free)):
        soft[k] = _sigmoid(free[k])


@loop()
def _adam(slope: Any, mean: Any, square: Any, moments: Any, lengths: Any) -> None:
    """Replace slopes by steps down them."""
    fresh, slow = np.float32(1) - moments[0], np.float32(1) - moments[1]
    for k in range(len(slope)):
        mean[k] += (slope[k] - mean[k]) * fresh
        square[k] += (slope[k] * slope[k] - square[k]) * slow
        slope[k] = lengths[0] * mean[k] / (np.sqrt(square[k] * lengths[1]) + np.float32(1e-8))
