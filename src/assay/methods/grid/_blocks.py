"""Loops over blocks, compiled for CPUs with numba: the scales that round best.

What rounds a group is named by a mode: the integers from low to high, a table of steps or a codebook; what a mode has no
use for is passed empty, so that each loop is compiled once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from assay.methods.compiled import look_up
from assay.methods.grid._codebook import nearest_runs, with_room
from assay.model.loops import loop

INTEGERS, TABLE, BOOK = 0, 1, 2


@njit(inline="always")
def half(x: Any) -> Any:
    """x as fp16 holds it, ties to even; past its end the last number."""
    x = min(max(np.float32(x), np.float32(-65504)), np.float32(65504))
    if abs(x) < np.float32(2.0**-14):
        return np.float32(np.rint(x * np.float32(2.0**24)) * np.float32(2.0**-24))
    bits = np.float32(x).view(np.uint32)
    bits = np.uint32(bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))
    return np.uint32((bits >> np.uint32(13)) << np.uint32(13)).view(np.float32)


@loop()
def _round(part: Any, price: Any, scale: Any, mode: int, low: Any, high: Any, table: Any, book: Any, steps: Any) -> Any:
    """Fill the steps nearest to part / scale; (weighted squared error, sum of price part step, sum of price step^2)."""
    if mode == BOOK:
        for k in range(len(part)):
            steps[k] = part[k] / scale
        nearest_runs(price, book, steps)
    elif mode == TABLE:
        for k in range(len(part)):
            steps[k] = look_up(part[k], scale, table, False, 0)
    else:
        for k in range(len(part)):
            steps[k] = min(max(np.float32(np.rint(part[k] / scale)), low), high)
    error, along, length = np.float32(0), np.float32(0), np.float32(0)
    for k in range(len(part)):
        away = part[k] - steps[k] * scale
        error += price[k] * away * away
        along += price[k] * part[k] * steps[k]
        length += price[k] * steps[k] * steps[k]
    return error, along, length


@loop()
def _free_scale(part: Any, price: Any, mode: int, low: Any, high: Any, table: Any, book: Any, factors: Any, both: bool,
                power: bool, steps: Any) -> Any:  # fmt: skip
    """The best scale of a group by itself, of those that put its largest weight near the last step; 0 if all are 0."""
    top = np.float32(0)
    for x in part:
        if abs(x) > abs(top):
            top = x
    if top == 0:
        return np.float32(0)
    best, found = np.float32(np.inf), np.float32(0)
    for end in (high, low) if both else (high, high):
        reach = top / end if both else abs(top / end)
        for factor in factors:
            scale = reach * factor
            if power:
                scale = np.float32(2.0) ** np.float32(np.rint(np.log2(scale)))
            error, along, length = _round(part, price, scale, mode, low, high, table, book, steps)
            if error < best:
                best, found = error, scale
            if len(factors) > 1 and not power and length > 0 and (both or along > 0):
                scale = along / length
                error, along, length = _round(part, price, scale, mode, low, high, table, book, steps)
                if error < best:
                    best, found = error, scale
        if not both:
            break
    return found


@loop()
def _sub(wanted: Any, sub: Any, upward: bool) -> Any:
    """A sub-scale beside the wanted one that can be stored; sub: (factor, added, least, greatest)."""
    place = (wanted - sub[1]) / sub[0]
    place = np.floor(place) + 1 if upward else np.floor(place)
    return min(max(np.float32(place * sub[0] + sub[1]), sub[2]), sub[3])


@loop()
def _divide(part: Any, price: Any, mode: int, low: Any, high: Any, table: Any, book: Any, sub: Any, free: Any, tries: int,
            unit: Any, subs: Any, steps: Any) -> Any:  # fmt: skip
    """One scale for a block [groups, group], and the sub-scales (filled) with which its groups come nearest to their own best."""
    groups = len(part)
    top, trial = np.float32(0), np.empty(groups, dtype=np.float32)
    for g in range(groups):
        if abs(free[g]) > abs(top):
            top = free[g]
    best, found = np.float32(np.inf), np.float32(0)
    subs[:] = sub[3]
    if top == 0:
        return found
    ends = (sub[3], sub[2]) if sub[2] < 0 else (sub[3], sub[3])
    for side in range(2 if sub[2] < 0 else 1):
        for attempt in range(tries):
            whole = half(top / (unit * (ends[side] - np.sign(ends[side]) * sub[0] * attempt)))
            if whole == 0:
                continue
            total, along_all, length_all = np.float32(0), np.float32(0), np.float32(0)
            for g in range(groups):
                least, along_g, length_g = np.float32(np.inf), np.float32(0), np.float32(0)
                wanted = free[g] / (whole * unit)
                for upward in (False, True):
                    value = _sub(wanted, sub, upward)
                    if value == 0:
                        error, along, length = np.float32(0), np.float32(0), np.float32(0)
                        for k in range(part.shape[1]):
                            error += price[g, k] * part[g, k] * part[g, k]
                    else:
                        error, along, length = _round(
                            part[g], price[g], whole * unit * value, mode, low, high, table, book, steps
                        )
                    if error < least:
                        least, trial[g], along_g, length_g = error, value, along * value, length * value * value
                total += least
                along_all += along_g
                length_all += length_g
            if total < best:
                best, found = total, whole
                subs[:] = trial
            if tries > 1 and length_all > 0:
                # the same sub-scales, with the scale that suits them all
                whole = half(along_all / (unit * length_all))
                if whole == 0:
                    continue
                total = np.float32(0)
                for g in range(groups):
                    if trial[g] == 0:
                        for k in range(part.shape[1]):
                            total += price[g, k] * part[g, k] * part[g, k]
                    else:
                        total += _round(part[g], price[g], whole * unit * trial[g], mode, low, high, table, book, steps)[0]
                if total < best:
                    best, found = total, whole
                    subs[:] = trial
    return found


@loop(cache=True)
def fit_scales(mode: int, low: Any, high: Any, table: Any, book: Any, both: bool, power: bool, sub: Any, unit: Any, tries: int,
               factors: Any, group: int, price: Any, weight: Any, d: Any, subs: Any) -> None:  # fmt: skip
    """Scales of rows of weights [rows, in]: d [rows, blocks] in fp16, and subs [rows, groups] if they have columns.

    price [in]: what a squared error costs; sub: see `_sub`; both: scales may be negative; power: they are powers of two;
    factors: of the scale that covers all; tries: how many sub-scales the largest group is offered.
    """
    blocks = d.shape[1]
    groups = weight.shape[1] // group // blocks
    free, steps, roomy = np.empty(groups, dtype=np.float32), np.empty(group, dtype=np.float32), with_room(book)
    for r in range(len(weight)):
        parts, prices = weight[r].reshape(blocks, groups, group), price.reshape(blocks, groups, group)
        for b in range(blocks):
            for g in range(groups):
                free[g] = _free_scale(parts[b, g], prices[b, g], mode, low, high, table, roomy, factors, both, power, steps)
            if subs.shape[1]:
                mine = subs[r, b * groups : (b + 1) * groups]
                d[r, b] = _divide(parts[b], prices[b], mode, low, high, table, roomy, sub, free, tries, unit, mine, steps)
            else:
                d[r, b] = free[0] if power else half(free[0] / unit)


@loop()
def _round_above(part: Any, price: Any, scale: Any, floor: Any, top: Any, steps: Any) -> Any:
    """Fill steps 0..top for part = scale step - floor; the weighted squared error."""
    error = np.float32(0)
    for k in range(len(part)):
        steps[k] = min(max(np.float32(np.rint((part[k] + floor) / scale)), np.float32(0)), top) if scale > 0 else np.float32(0)
        away = part[k] + floor - steps[k] * scale
        error += price[k] * away * away
    return error


@loop()
def _refit(part: Any, price: Any, steps: Any, floor: Any, signed: bool, fixed: bool) -> Any:
    """(scale, floor) of least squares for given steps, floor kept if `fixed` and not negative unless `signed`."""
    one, step, square, value, cross = np.float64(0), np.float64(0), np.float64(0), np.float64(0), np.float64(0)
    for k in range(len(part)):
        p, s, x = np.float64(price[k]), np.float64(steps[k]), np.float64(part[k])
        one += p
        step += p * s
        square += p * s * s
        value += p * x
        cross += p * x * s
    if not fixed:
        determinant = one * square - step * step
        if determinant > 1e-9 * one * square:
            floor = np.float32((step * cross - square * value) / determinant)
        if not signed:
            floor = max(floor, np.float32(0))
    if square > 0:
        return np.float32((cross + floor * step) / square), floor
    return np.float32(0), floor


@loop()
def _free_pair(part: Any, price: Any, top: Any, signed: bool, factors: Any, steps: Any) -> Any:
    """(scale, floor) of a group by itself, of those that cut the range of its weights by two factors."""
    least, most = part.min(), part.max()
    if not signed:
        least, most = min(least, np.float32(0)), max(most, np.float32(0))
    best, scale, floor = np.float32(np.inf), np.float32(0), -least
    if most == least:
        return scale, floor
    middle = (least + most) / 2 if signed else np.float32(0)
    for below in factors:
        for above in factors:
            low, high = middle + below * (least - middle), middle + above * (most - middle)
            s, f = (high - low) / top, -low
            error = _round_above(part, price, s, f, top, steps)
            if error < best:
                best, scale, floor = error, s, f
            if len(factors) > 1:
                s, f = _refit(part, price, steps, f, signed, False)
                if s > 0:
                    error = _round_above(part, price, s, f, top, steps)
                    if error < best:
                        best, scale, floor = error, s, f
    return scale, floor


@loop(cache=True)
def fit_pairs(top: Any, signed: bool, most: Any, tries: int, factors: Any, group: int, price: Any, weight: Any, d: Any, m: Any,
              subs: Any, mins: Any) -> None:  # fmt: skip
    """Scales and floors of rows of weights [rows, in], weight = d sub step - m min with steps 0..top; see `fit_scales`.

    subs, mins [rows, groups], 0..most, or without columns: then d and m stand alone, and m may have either sign if `signed`.
    """
    blocks = d.shape[1]
    groups = weight.shape[1] // group // blocks
    scales, floors = np.empty(groups, dtype=np.float32), np.empty(groups, dtype=np.float32)
    steps, trial = np.empty(group, dtype=np.float32), np.empty(groups, dtype=np.float32)
    for r in range(len(weight)):
        parts, prices = weight[r].reshape(blocks, groups, group), price.reshape(blocks, groups, group)
        for b in range(blocks):
            for g in range(groups):
                scales[g], floors[g] = _free_pair(parts[b, g], prices[b, g], top, signed, factors, steps)
            if not subs.shape[1]:
                d[r, b], m[r, b] = half(scales[0]), half(floors[0])
                continue
            own = slice(b * groups, (b + 1) * groups)
            m[r, b] = _share(parts[b], prices[b], scales, floors, True, top, most, tries, trial, steps)
            mins[r, own] = trial
            for g in range(groups):
                floor = m[r, b] * trial[g]
                if tries > 1:
                    for _ in range(2):
                        _round_above(parts[b, g], prices[b, g], scales[g], floor, top, steps)
                        scale = _refit(parts[b, g], prices[b, g], steps, floor, signed, True)[0]
                        scales[g] = scale if scale > 0 else scales[g]
                floors[g] = floor
            d[r, b] = _share(parts[b], prices[b], scales, floors, False, top, most, tries, trial, steps)
            subs[r, own] = trial


@loop()
def _share(part: Any, price: Any, scales: Any, floors: Any, of_floors: bool, top: Any, most: Any, tries: int, found: Any,
           steps: Any) -> Any:  # fmt: skip
    """One fp16 number whose multiples 0..most (filled) replace the floors, or the scales, of all groups at least cost."""
    wanted = floors if of_floors else scales
    largest, groups = wanted.max(), len(part)
    best, chosen = np.float32(np.inf), np.float32(0)
    trial = np.empty(groups, dtype=np.float32)
    found[:] = 0
    if not largest > 0:
        return chosen
    for attempt in range(tries):
        whole = half(largest / (most - attempt))
        if whole == 0:
            continue
        total = np.float32(0)
        for g in range(groups):
            least = np.float32(np.inf)
            for upward in range(2):
                value = min(max(np.float32(np.floor(wanted[g] / whole) + upward), np.float32(0)), most)
                scale, floor = (scales[g], whole * value) if of_floors else (whole * value, floors[g])
                error = _round_above(part[g], price[g], scale, floor, top, steps)
                if of_floors and tries > 1:
                    fitted = _refit(part[g], price[g], steps, floor, False, True)[0]
                    if fitted > 0:
                        error = min(error, _round_above(part[g], price[g], fitted, floor, top, steps))
                if error < least:
                    least, trial[g] = error, value
            total += least
        if total < best:
            best, chosen = total, whole
            found[:] = trial
    return chosen
