"""The nearest vectors of a codebook of magnitudes (`blocks.Codebook`), compiled for CPUs with numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from assay.methods.compiled import loop


@njit(inline="always")
def pattern_of(target: Any, at: int, size: int, bounds: Any) -> Any:
    """Row of `Codebook.nearby` for the magnitudes target[at : at + size]."""
    pattern = 0
    for j in range(at, at + size):
        place = 0
        for b in range(len(bounds)):
            place += np.int64(target[j] > bounds[b])
        pattern = pattern * (len(bounds) + 1) + place
    return pattern


@loop()
def with_room(book: Any) -> Any:
    """A book and room for magnitudes, and for what is computed of every code that is tried."""
    reach = book[1].shape[2]
    return (*book, np.empty(8, dtype=np.float32), np.empty(reach, dtype=np.float32), np.empty(reach, dtype=np.float32))


@loop()
def _errors(target: Any, at: int, price: Any, first: int, near: Any, errors: Any, later: bool) -> None:
    """Weighted squared errors of four magnitudes by all codes that are tried; these stand side by side, for vector code."""
    t0, t1, t2, t3 = target[at], target[at + 1], target[at + 2], target[at + 3]
    p0, p1, p2, p3 = price[first], price[first + 1], price[first + 2], price[first + 3]
    n0, n1, n2, n3 = near[0], near[1], near[2], near[3]
    if later:
        for k in range(len(errors)):
            a0, a1, a2, a3 = t0 - n0[k], t1 - n1[k], t2 - n2[k], t3 - n3[k]
            errors[k] += p0 * a0 * a0 + p1 * a1 * a1 + p2 * a2 * a2 + p3 * a3 * a3
    else:
        for k in range(len(errors)):
            a0, a1, a2, a3 = t0 - n0[k], t1 - n1[k], t2 - n2[k], t3 - n3[k]
            errors[k] = p0 * a0 * a0 + p1 * a1 * a1 + p2 * a2 * a2 + p3 * a3 * a3


@njit(inline="always")
def least_of(values: Any) -> Any:
    """(the least of them, its first place)."""
    least, place = values[0], 0
    for k in range(len(values)):
        least = min(least, values[k])
    while values[place] > least:
        place += 1
    return least, place


@njit(inline="always")
def _best_code(at: int, price: Any, first: int, turning: bool, book: Any) -> Any:
    """(weighted squared error, magnitudes, place whose sign is turned or -1) of the vector nearest to what the room holds."""
    bounds, nearby, target, errors, least = book[0], book[1], book[3], book[4], book[5]
    size = nearby.shape[1]
    near = nearby[pattern_of(target, at, size, bounds)]
    _errors(target, at, price, first, near, errors, False)
    if size == 8:
        _errors(target, at + 4, price, first + 4, near[4:], errors, True)
    if turning:
        least[:] = np.inf
        for j in range(size):
            along = price[first + j] * target[at + j]
            for k in range(len(least)):
                least[k] = min(least[k], along * near[j, k])
        for k in range(len(least)):
            errors[k] += np.float32(4) * least[k]
    lowest, chosen = least_of(errors)
    turned = -1
    if turning:
        cheapest = np.float32(np.inf)
        for j in range(size):
            cost = price[first + j] * target[at + j] * near[j, chosen]
            if cost < cheapest:
                cheapest, turned = cost, j
    return lowest, near[:, chosen], turned


@njit(inline="always")
def nearest_run(part: Any, price: Any, first: int, length: int, scale: Any, book: Any, steps: Any) -> None:
    """Fill steps[first : first + length] with the vectors of a codebook nearest to part / scale.

    Of one vector, or of all that share an even count. book: the parts of a `Codebook`, with room.
    """
    size, even, target = book[1].shape[1], book[2], book[3]
    odd = False
    for j in range(length):
        ratio = part[first + j] / scale
        target[j] = abs(ratio)
        odd ^= ratio < 0
        steps[first + j] = np.float32(-1) if ratio < 0 else np.float32(1)
    cheapest, turn_at = np.float32(np.inf), -1
    if even and odd:
        for k in range(0, length, size):
            extra = np.float32(0)
            if size < length:
                extra = -_best_code(k, price, first + k, False, book)[0]
            extra += _best_code(k, price, first + k, True, book)[0]
            if extra < cheapest:
                cheapest, turn_at = extra, k
    for k in range(0, length, size):
        _, magnitudes, turn = _best_code(k, price, first + k, k == turn_at, book)
        if turn >= 0:
            steps[first + k + turn] = -steps[first + k + turn]
        for j in range(size):
            steps[first + k + j] *= magnitudes[j]


@njit(nogil=True, cache=True, error_model="numpy")
def project(book: Any, price: Any, values: Any, scale: Any, steps: Any) -> None:
    """The nearest vectors of rows of values [rows, in], each weight's scale beside it; squared errors cost price [in]."""
    size, roomy = 8 if book[2] else book[1].shape[1], with_room(book)
    for r in range(len(values)):
        row, spacing, found = values[r], scale[r], steps[r]
        for k in range(0, values.shape[1], size):
            nearest_run(row, price, k, size, spacing[k], roomy, found)
