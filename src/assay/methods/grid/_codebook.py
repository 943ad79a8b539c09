"""The nearest vectors of a codebook of magnitudes (`blocks.Codebook`), compiled for CPUs with numba.

Arrays are indexed and not cut in what is done for every vector: a slice takes as long as the search.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from assay.model.loops import loop


@loop()
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
    """A book, and room for magnitudes and for what is computed of every code that is tried."""
    return (*book, np.empty((3, max(8, book[1].shape[2])), dtype=np.float32))


@loop()
def nearest_runs(price: Any, book: Any, steps: Any) -> None:
    """Replace numbers by the nearest vectors; a squared error costs price. Where they share a count of signs, it stays even.

    price, steps: as many runs as they hold; book: the parts of a `Codebook`, with room.
    """
    bounds, nearby, even, room = book
    size, reach = nearby.shape[1:]
    run = 8 if even else size
    found, errors, turns = room[0], room[1, :reach], room[2, :reach]
    for first in range(0, len(steps), run):
        odd = False
        for j in range(first, first + run):
            odd ^= steps[j] < 0
            found[j - first] = abs(steps[j])
            steps[j] = np.float32(-1) if steps[j] < 0 else np.float32(1)
        cheapest, turned = np.float32(np.inf), -1
        turned_first, turned_pattern, turned_code = 0, 0, 0
        for at in range(first, first + run, size):
            pattern = pattern_of(found, at - first, size, bounds)
            errors[:] = 0
            for j in range(at, at + size):
                target, weight = found[j - first], price[j]
                for k in range(reach):
                    away = target - nearby[pattern, j - at, k]
                    errors[k] += weight * away * away
            least, code = least_of(errors)
            if even and odd:
                turns[:] = np.inf
                for j in range(at, at + size):
                    along = np.float32(4) * price[j] * found[j - first]
                    for k in range(reach):
                        turns[k] = min(turns[k], along * nearby[pattern, j - at, k])
                for k in range(reach):
                    errors[k] += turns[k]
                other, other_code = least_of(errors)
                if other - least < cheapest:
                    cheapest = other - least
                    turned_first, turned_pattern, turned_code = at, pattern, other_code
                    lowest = np.float32(np.inf)
                    for j in range(at, at + size):
                        cost = price[j] * found[j - first] * nearby[pattern, j - at, other_code]
                        if cost < lowest:
                            lowest, turned = cost, j
            for j in range(at, at + size):
                found[j - first] = nearby[pattern, j - at, code]
        if turned >= 0:
            steps[turned] = -steps[turned]
            for j in range(turned_first, turned_first + size):
                found[j - first] = nearby[turned_pattern, j - turned_first, turned_code]
        for j in range(first, first + run):
            steps[j] *= found[j - first]


@loop()
def least_of(values: Any) -> Any:
    """(the least of them, its first place)."""
    least, place = values[0], 0
    for k in range(len(values)):
        least = min(least, values[k])
    while values[place] > least:
        place += 1
    return least, place


@loop(cache=True)
def project(book: Any, price: Any, steps: Any) -> None:
    """`nearest_runs` of each of the rows [rows, in]; price [in]."""
    roomy = with_room(book)
    for r in range(len(steps)):
        nearest_runs(price, roomy, steps[r])
