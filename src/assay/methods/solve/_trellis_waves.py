"""Two-sided error feedback with a trellis along the antidiagonals, compiled for CPUs with numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from assay.methods.grid._trellis import best_path, write
from assay.model.loops import loop


@loop()
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@njit(nogil=True, cache=True)
def encode_waves(bits: int, steps: Any, tables: Any, window: int, weights: Any, scales: Any, rows: Any, columns: Any,
                 upwards: Any, words: Any, values: Any) -> None:  # fmt: skip
    """Encode each weight [n, out, in] as one stream; fills words [n, words] and the unscaled values [n, out, in].

    scales [n, out]; rows = A^T [n, out, out] and columns = U^T [n, in, in], both lower, see `trellis.solve`;
    upwards [n]: whether an antidiagonal starts at its last row. window: of `best_path`, to begin with.
    """
    for m in range(len(weights)):
        _encode(bits, steps, tables, window, weights[m], scales[m], rows[m], columns[m], upwards[m], words[m], values[m])


@njit(nogil=True)
def _encode(bits: int, steps: Any, tables: Any, window: int, weight: Any, scale: Any, rows: Any, columns: Any,
            upwards: bool, words: Any, values: Any) -> None:  # fmt: skip
    down, across = weight.shape
    errors = np.zeros((down, across), dtype=np.float32)
    handed = np.zeros((across, down), dtype=np.float32)  # (E U)^T: dot products below run along memory
    longest = min(down, across)
    target, left = np.empty(longest, dtype=np.float32), np.empty(longest, dtype=np.float32)
    x, root = np.empty(longest, dtype=np.float32), np.empty(longest, dtype=np.float32)
    states, path = np.empty(longest, dtype=np.int64), np.empty(down * across, dtype=np.uint16)
    state, count = 0, 0
    for wave in range(down + across - 1):
        first, last = max(0, wave - across + 1), min(down - 1, wave)
        n = last - first + 1
        for a in range(n):
            i = last - a if upwards else first + a
            j = wave - i
            left[a] = _dot(errors[i, :j], columns[j, :j])
            target[a] = weight[i, j] - _dot(rows[i, :i], handed[j, :i]) - rows[i, i] * left[a]
            x[a] = target[a] / scale[i]
            root[a] = scale[i] / (rows[i, i] * columns[j, j])
        root[:n] /= root[:n].max()
        phases = (np.arange(n + 1) + count) % len(steps)
        start = state & ((1 << (bits - steps[phases[0]])) - 1)
        best_path(bits, steps, tables, phases, x[:n], root[:n], start, False, window, states)
        for a in range(n):
            i = last - a if upwards else first + a
            j = wave - i
            values[i, j] = tables[phases[a], states[a]]
            errors[i, j] = (target[a] - values[i, j] * scale[i]) / (rows[i, i] * columns[j, j])
            handed[j, i] = left[a] + errors[i, j] * columns[j, j]
        path[count : count + n] = states[:n]
        state, count = states[n - 1], count + n
    write(steps, path, words)
