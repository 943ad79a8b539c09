"""The Viterbi search of `trellis`, compiled for CPUs with numba.

Names: a state is the last L bits of the stream; the step that shifts in `k` of them leaves from a group, the state
before without its k oldest bits. So group g fans out into states g 2^k .. (g + 1) 2^k - 1, and the 2^k states
g + j 2^(L - k) merge into group g of the next step. Both orders are contiguous, which is what keeps the loops in SIMD.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FAST = {"contract", "nsz", "nnan"}


@njit(inline="always")
def _lesser(a: Any, b: Any) -> Any:
    return a if a < b else b


@njit(inline="always")
def _squared(x: Any, root: Any, value: Any) -> Any:
    error = x - root * value
    return error * error


@njit(inline="always")
def _fan(width: Any, values: Any, x: Any, root: Any, groups: Any, cost: Any) -> None:
    """cost[g width + b] = groups[g] + error; `width` a literal, so that the loop over b becomes shuffles."""
    for g in range(len(groups)):
        for b in range(width):
            cost[width * g + b] = groups[g] + _squared(x, root, values[width * g + b])


@njit(inline="always")
def _widen(width: Any, groups: Any, wide: Any) -> None:
    for g in range(len(groups)):
        for b in range(width):
            wide[width * g + b] = groups[g]


@njit(nogil=True, fastmath=FAST)
def _branch(k: int, values: Any, x: Any, root: Any, groups: Any, wide: Any, cost: Any) -> None:
    """Cost of every state after a step of k bits, from the cost of every group before it."""
    if k == 1:
        _fan(2, values, x, root, groups, cost)
    elif k == 2:
        _fan(4, values, x, root, groups, cost)
    elif k == 3:
        _widen(2, groups, wide)
        _fan(4, values, x, root, wide[: 2 * len(groups)], cost)
    elif k == 4:
        _widen(4, groups, wide)
        _fan(4, values, x, root, wide[: 4 * len(groups)], cost)
    else:
        width = 1 << k
        for g in range(len(groups)):
            base = groups[g]
            into, of = cost[g * width : (g + 1) * width], values[g * width : (g + 1) * width]
            for b in range(len(into)):
                into[b] = base + _squared(x, root, of[b])


@njit(nogil=True, fastmath=FAST)
def _merge(cost: Any, groups: Any) -> None:
    """Cost of every group of the next step: the least of the states that lead to it."""
    size = len(groups)
    a, b = cost[:size], cost[size : 2 * size]
    if len(cost) == 2 * size:
        for g in range(size):
            groups[g] = _lesser(a[g], b[g])
        return
    c, d = cost[2 * size : 3 * size], cost[3 * size : 4 * size]
    for g in range(size):
        groups[g] = _lesser(_lesser(a[g], b[g]), _lesser(c[g], d[g]))
    for start in range(4 * size, len(cost), 4 * size):
        a, b = cost[start : start + size], cost[start + size : start + 2 * size]
        c, d = cost[start + 2 * size : start + 3 * size], cost[start + 3 * size : start + 4 * size]
        for g in range(size):
            groups[g] = _lesser(groups[g], _lesser(_lesser(a[g], b[g]), _lesser(c[g], d[g])))


@njit(nogil=True, fastmath=FAST)
def _least(values: Any) -> Any:
    low = values[0]
    for v in values:
        low = _lesser(low, v)
    return low


@njit(nogil=True, fastmath=FAST)
def _trace(bits: int, steps: Any, tables: Any, phases: Any, after: int, x: Any, root: Any, rows: Any,
           low: int, high: int, group: int, states: Any) -> None:  # fmt: skip
    """Fill states[low:high] with the best way to `group` of step `high`. Costs of states are made again, not stored."""
    following = steps[phases[high]] if high < len(x) else after
    for t in range(high - 1, low - 1, -1):
        k, values, groups = steps[phases[t]], tables[phases[t]], rows[t % len(rows)]
        stride = 1 << (bits - following)
        best, chosen = np.float32(np.inf), group
        for s in range(group, 1 << bits, stride):
            cost = groups[s >> k] + _squared(x[t] * root[t], root[t], values[s])
            if cost < best:
                best, chosen = cost, s
        states[t] = chosen
        group, following = chosen >> k, k


@njit(nogil=True)
def _search(bits: int, steps: Any, tables: Any, phases: Any, after: int, x: Any, root: Any, start: int, closed: bool,
            window: int, states: Any) -> bool:  # fmt: skip
    """Fill `states` with the path of least sum of (root (x - value))^2; whether it is surely that path.

    start: the group that the first step leaves, -1: any; closed: the last step must end in it too.
    after: bits of the step after the last. Only 2 `window` rows of costs are kept: from the best state so far the
    older half of them is decided. That is right if the way back from later states joins it, which is checked.
    """
    n = len(x)
    rows = np.empty((min(2 * window, n) + 1, 1 << (bits - steps.min())), dtype=np.float32)
    cost, wide = np.empty(1 << bits, dtype=np.float32), np.empty(1 << (bits - 2), dtype=np.float32)
    rows[0] = np.float32(0 if start < 0 else np.inf)
    if start >= 0:
        rows[0, start] = 0
    decided = 0
    for t in range(n):
        k, following = steps[phases[t]], steps[phases[t + 1]] if t + 1 < n else after
        groups = rows[(t + 1) % len(rows)][: 1 << (bits - following)]
        _branch(k, tables[phases[t]], x[t] * root[t], root[t], rows[t % len(rows)][: 1 << (bits - k)], wide, cost)
        _merge(cost, groups)
        if t % 16 == 15:
            groups -= _least(groups)
        if t + 1 < n and t + 1 < decided + 2 * window:
            continue
        end = start if t + 1 == n and closed else int(np.argmin(groups))
        left, width = states[decided], steps[phases[decided]]
        _trace(bits, steps, tables, phases, after, x, root, rows, decided, t + 1, end, states)
        if decided and states[decided] >> width != left >> width:
            return False
        decided += window
    return True


@njit(nogil=True)
def best_path(bits: int, steps: Any, tables: Any, phases: Any, x: Any, root: Any, start: int, closed: bool,
              window: int, states: Any) -> None:  # fmt: skip
    """`_search` with windows as long as it takes. Steps go round: the first one follows the last."""
    while not _search(bits, steps, tables, phases, steps[phases[0]], x, root, start, closed, window, states):
        window *= 4


@njit(nogil=True, cache=True)
def encode_rows(bits: int, steps: Any, tables: Any, window: int, reach: int, x: Any, weight: Any, words: Any,
                values: Any) -> None:  # fmt: skip
    """Encode each row of x [rows, n] alone; fills words [rows, words] and the decoded values [rows, n].

    steps: bits of the steps in turn; tables [turns, 2^L]: the values of their states. weight [rows, n], or no columns:
    all equal. Two searches: one from `reach` before the end on into the start finds the group where they should
    meet, the other encodes the whole row through it. window: of `_search`, to begin with.
    """
    n = x.shape[1]
    phases = np.arange(n) % len(steps)
    side = min(reach, (n + 1) // 2)
    seam = np.concatenate((np.arange(n - side, n), np.arange(side)))
    nearby, states = np.empty(2 * side, dtype=np.int64), np.empty(n, dtype=np.int64)
    root = np.ones(n, dtype=np.float32)
    for r in range(len(x)):
        if weight.shape[1]:
            top = weight[r].max()
            root[:] = np.sqrt(weight[r] / (top if top > 0 else np.float32(1)))
        best_path(bits, steps, tables, phases[seam], x[r][seam], root[seam], -1, False, window, nearby)
        best_path(bits, steps, tables, phases, x[r], root, nearby[side] >> steps[0], True, window, states)
        write(steps, states, words[r])
        for t in range(n):
            values[r, t] = tables[phases[t], states[t]]


@njit(nogil=True)
def write(steps: Any, states: Any, words: Any) -> None:
    """The bits that each step shifted in, most significant first; steps in turn."""
    held, fill, place = np.uint64(0), 0, 0
    for t in range(len(states)):
        k = steps[t % len(steps)]
        held = (held << np.uint64(k)) | np.uint64(np.int64(states[t]) & ((1 << k) - 1))
        fill += k
        if fill >= 32:
            fill -= 32
            words[place] = np.int32((held >> np.uint64(fill)) & np.uint64(0xFFFFFFFF))
            place += 1
    if fill:
        words[place] = np.int32((held << np.uint64(32 - fill)) & np.uint64(0xFFFFFFFF))
