"""Lower convex hulls of menus, compiled: those of 100,000 decisions take a few hundredths of a second."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(nogil=True, cache=True)
def hulls(nbytes: Any, damage: Any, count: Any, target: Any, slope: Any, length: Any) -> None:
    """Writes the steps between neighbours on each hull, from option 0 on.

    nbytes: int64, damage: float64 [decisions, options]; count: int64 [decisions], of options. Written: target: int64
    [decisions, options], the option that a step leads to; slope: float64, damage that it takes away per byte, not rising
    along a hull; length: int64 [decisions], of steps. Options on one line make one step, to the farthest.
    """
    for row in range(len(count)):
        steps = 0
        for option in range(1, count[row]):
            while True:
                last = target[row, steps - 1] if steps else 0
                more, less = nbytes[row, option] - nbytes[row, last], damage[row, last] - damage[row, option]
                steep = less / more if more > 0 and less > 0 else 0.0
                if steps == 0 or less <= 0 or 0 < steep < slope[row, steps - 1]:
                    break
                steps -= 1
            if steep > 0:
                target[row, steps], slope[row, steps] = option, steep
                steps += 1
        length[row] = steps
