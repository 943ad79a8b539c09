"""Moves that lower f = 1/2 tr(G D H D^T) one at a time: vectors of a codebook, and the scales of blocks. Compiled with numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from assay.methods.grid._blocks import half
from assay.methods.grid._codebook import least_of, pattern_of
from assay.model.loops import loop


@loop(cache=True)
def descend_vectors(book: Any, start: int, stop: int, inputs: Any, inverses: Any, outputs: Any, through: Any, gradient: Any,
                    scale: Any, steps: Any) -> None:  # fmt: skip
    """Offer every vector of columns start..stop of each matrix the codes near its optimum, one vector after another.

    As `compiled.descend_block`; inverses [matrices, in / v, v, v]: of the blocks on the diagonal of `inputs`. Where the
    number of signs in 8 weights is even, it stays so.
    """
    bounds, nearby, even = book
    size = nearby.shape[1]
    target, signs, best, slope = np.empty((4, size), np.float32)
    change, turned = np.empty(nearby.shape[2], np.float32), np.empty(nearby.shape[2], np.float32)
    away = np.empty(nearby.shape[1:], np.float32)
    for n in range(len(steps)):
        rows = steps.shape[2]
        pushed, heavy = np.zeros((size, rows), dtype=np.float32), np.diag(outputs[n])
        for j in range(start, stop, size):
            local, inverse = inputs[n, j : j + size, j : j + size], inverses[n, j // size]
            moves = 0
            pushed[:] = 0
            for i in range(rows):
                weight, spacing = heavy[i], scale[n, j, i]
                odd = False
                for a in range(size):
                    slope[a] = gradient[n, j - start + a, i]
                for a in range(size):
                    pull = np.float32(0)
                    for b in range(size):
                        pull += inverse[a, b] * slope[b]
                    ratio = steps[n, j + a, i] + pull / (weight * spacing)
                    target[a], signs[a] = abs(ratio), np.float32(-1) if ratio < 0 else np.float32(1)
                    odd ^= ratio < 0
                if size == 4 and even:
                    for a in range(4):
                        odd ^= steps[n, (j ^ 4) + a, i] < 0
                pattern = pattern_of(target, 0, size, bounds)
                turned[:] = -1
                if even and odd:
                    _turn(target, local, nearby, pattern, change, turned)
                for a in range(size):
                    sign, present, index = signs[a], steps[n, j + a, i], np.float32(a)
                    for k in range(len(turned)):
                        away[a, k] = ((-sign if turned[k] == index else sign) * nearby[pattern, a, k] - present) * spacing
                _changes(weight, local, slope, away, turned, change)
                least, chosen = least_of(change)
                if not least < 0:
                    continue
                best[:] = away[:, chosen]
                moves += 1
                for a in range(size):
                    steps[n, j + a, i] = np.rint(steps[n, j + a, i] + best[a] / spacing)
                    bent = np.float32(0)
                    for b in range(size):
                        bent += local[a, b] * best[b]
                    beside, own = outputs[n, i], pushed[a]
                    # Rows before it have had their turn, and the next sweep makes its own.
                    slopes, rest = gradient[n, j - start + a, i + 1 :], beside[i + 1 :]
                    for k in range(rows):
                        own[k] += best[a] * beside[k]
                    for k in range(len(rest)):
                        slopes[k] -= bent * rest[k]
            if moves:
                for a in range(size):
                    through[n, j + a] -= pushed[a]
                for later in range(j + size, stop):
                    for a in range(size):
                        push = inputs[n, later, j + a]
                        for k in range(rows):
                            gradient[n, later - start, k] -= push * pushed[a, k]


@loop()
def _turn(target: Any, local: Any, nearby: Any, pattern: int, least: Any, turned: Any) -> None:
    """Fill, for each vector near a pattern, the place whose sign costs least to turn."""
    least[:] = np.inf
    for a in range(len(target)):
        along, index = local[a, a] * target[a], np.float32(a)
        for k in range(len(least)):
            cost = along * nearby[pattern, a, k]
            turned[k] = index if cost < least[k] else turned[k]
            least[k] = min(cost, least[k])


@loop()
def _changes(weight: Any, local: Any, slope: Any, away: Any, bent: Any, change: Any) -> None:
    """Fill by how much each move [v, reach] changes f: its own curvature, weight times local [v, v], less what it goes down."""
    change[:] = 0
    for a in range(len(slope)):
        down, own = slope[a], np.float32(0.5) * weight * local[a, a]
        for k in range(len(change)):
            bent[k] = own * away[a, k] - down
        for b in range(a + 1, len(slope)):
            push = weight * local[a, b]
            for k in range(len(change)):
                bent[k] += push * away[b, k]
        for k in range(len(change)):
            change[k] += away[a, k] * bent[k]


@loop(cache=True)
def move_parameters(stored: Any, passes: int, normal: Any, slope: Any, values: Any) -> None:
    """Coordinate descent on one number per row, values [matrices, out], f quadratic in them: normal [matrices, out, out].

    slope [matrices, out]: minus the gradient of f. stored: (factor, added, least, greatest) of the numbers that
    exist, or factor 0 for fp16 other than 0.
    """
    factor, added, least, greatest = stored
    for n in range(len(values)):
        for _ in range(passes):
            moved = False
            for i in range(values.shape[1]):
                curvature, present = normal[n, i, i], values[n, i]
                if not curvature > 0:
                    continue
                wanted = present + slope[n, i] / curvature
                if factor == 0:
                    found = half(wanted)
                    if found == 0:
                        continue
                else:
                    found = np.float32(np.rint((wanted - added) / factor)) * factor + added
                    found = min(max(found, least), greatest)
                step = found - present
                if step == 0 or (curvature * step * np.float32(0.5) - slope[n, i]) * step >= 0:
                    continue
                moved = True
                values[n, i] = found
                for k in range(values.shape[1]):
                    slope[n, k] -= step * normal[n, i, k]
            if not moved:
                break
