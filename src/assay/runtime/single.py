"""Attention of one query on CPUs, compiled: scores, softmax and the sum of values straight from what a cache stores.

In torch every codec, mask and product is a call and a pass over memory, which is what a step of a small cache is made of.
Here a few tokens at a time become numbers, in a buffer that stays in the first cache, for all query heads of their group.
`Lane` holds the same in torch, which other devices and other codecs run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.loops import loop
from assay.model.threads import WORTH_SHARING, spread
from assay.runtime.grown import array_of
from assay.runtime.unpacking import number, read_row, unpack_row

NONE, PLAIN, TOKEN, CHANNEL, FLOAT, BLOCK = range(6)
"""How stored slots are read: as they are, or as `PerToken`, `PerChannel`, `Float8` (E4M3) and `BlockFloat` write them."""
AT_ONCE = 32
FIELDS = ("codes", "scale", "low", "group", "exponent", "x")
"""Names under which codecs keep what a `Source` has after its first field."""
EMPTY = tuple(
    tuple(np.empty((0, 0, 0, 0), t) for t in (np.uint8, np.int16, np.int16, np.int16, np.int8, exact))
    for exact in (np.float32, np.int16)
)
"""Those fields where they aren't used, beside float32 and beside 16-bit floats."""


ALL = np.empty(0, np.int64)


class Source(NamedTuple):
    """Slots of one side as a kernel reads them; where a field isn't used it is an array without elements.

    exact: float32, or int16 for the bits of 16-bit floats, [B, H, n, D]; codes uint8 [B, H, old, bytes]; scale, low: bits of
    16-bit floats [B, H, old or groups, ...]; member int [B, H, old, 1]; exponent int8 [B, H, old, groups]; plain: as `exact`,
    [B, H, old, r]; kind: see above; half: of `exact` and `plain`, -1 for float32; coded: of scale and low.
    """

    exact: Any
    codes: Any
    scale: Any
    low: Any
    member: Any
    exponent: Any
    plain: Any
    kind: int
    bits: int
    half: int
    coded: int
    old: int
    width: int


class Sight(NamedTuple):
    """What queries see. asked int [B]: the position of each, or empty where each sees every slot; window: tokens seen back, 0
    for all; softcap: 0 for none; positions int32 [B, H or 1, room]; newest: written as that of the last slot, -1: it is there.
    """

    asked: Any
    positions: Any
    newest: int
    window: int
    scaling: float
    softcap: float


def attend_one(query: Tensor, inside: Tensor | None, sight: Sight, key: Tensor, value: Tensor, keys: Source, values: Source,
               attention: Any, logits: Any) -> Tensor:  # fmt: skip
    """Append the last slot and attend to all of them: float32 [B, Hq, 1, D]; fills attention and logits.

    query float32 [B, Hq, 1, D]; inside: what it is for stored keys, [B, Hq, 1, r], None for the same; key, value [B, H, 1, D]:
    of the last slot; keys of kind NONE: attention holds the products with stored slots already; values: the sum leaves
    stored slots out; attention, logits: numpy, float32 [B, H, g, S], logits without slots if nobody asks.
    """
    rows, heads = query.shape[:2]
    out = np.empty((rows, heads, value.shape[3]), np.float32)
    turned = query.detach().numpy().reshape(rows, heads, -1)
    stored = turned if inside is None else inside.detach().numpy().reshape(rows, heads, -1)
    shared = (turned, stored, sight, array_of(key), array_of(value), keys, values, logits, attention, out)
    count = attention.shape[0] * attention.shape[1]
    spread(_attend, count, shared, (torch.arange(count),), attention.size * key.shape[3] >= WORTH_SHARING)
    return torch.from_numpy(out)[:, :, None]


@loop(cache=True)
def _attend(query: Any, inside: Any, sight: Any, key: Any, value: Any, keys: Any, values: Any, logits: Any, attention: Any,
            out: Any, order: Any) -> None:  # fmt: skip
    """See `attend_one`; for heads row * heads + head in `order`."""
    heads, group, slots = attention.shape[1], attention.shape[2], attention.shape[3]
    width, broad = query.shape[2], values.exact.shape[3]
    rows = np.zeros((AT_ONCE, max(width, broad, keys.width, values.width) + 8), np.float32)
    sums = np.empty((group, broad), np.float32)
    scaling, softcap = np.float32(sight.scaling), np.float32(sight.softcap)
    for k in range(len(order)):
        b, h = order[k] // heads, order[k] % heads
        mine, found = slice(h * group, (h + 1) * group), attention[b, h]
        place = sight.positions[b, min(h, sight.positions.shape[1] - 1)]
        if sight.newest >= 0:
            place[slots - 1] = sight.newest
        for i in range(width):
            keys.exact[b, h, slots - keys.old - 1, i] = key[b, h, 0, i]
        for i in range(broad):
            values.exact[b, h, slots - values.old - 1, i] = value[b, h, 0, i]
        for start in range(0, keys.old if keys.kind else 0, AT_ONCE):
            count = min(AT_ONCE, keys.old - start)
            _read(keys, b, h, start, count, rows)
            add_dots(inside[b, mine], rows, keys.width, start, count, found)
        for start in range(keys.old, slots, AT_ONCE):
            count = min(AT_ONCE, slots - start)
            _numbers(keys.exact[b, h, start - keys.old : start - keys.old + count], keys.half, rows)
            add_dots(query[b, mine], rows, width, start, count, found)
        for j in range(group):
            for t in range(slots):
                found[j, t] *= scaling
            if softcap > 0:
                for t in range(slots):
                    found[j, t] = np.float32(np.tanh(found[j, t] / softcap)) * softcap
            if logits.shape[3]:
                logits[b, h, j] = found[j]
            weigh(found[j], place, sight, b)
        sums[:] = 0
        for start in range(0, values.old if values.kind else 0, AT_ONCE):
            count = min(AT_ONCE, values.old - start)
            _read(values, b, h, start, count, rows)
            add_rows(found, rows, start, count, sums)
        for start in range(values.old, slots, AT_ONCE):
            count = min(AT_ONCE, slots - start)
            _numbers(values.exact[b, h, start - values.old : start - values.old + count], values.half, rows)
            add_rows(found, rows, start, count, sums)
        out[b, mine] = sums


@loop(cache=True)
def add_dots(query: Any, rows: Any, width: Any, start: Any, count: Any, to: Any) -> None:
    """to[j, start + n] = query[j] * rows[n] over `width` numbers, four rows at a time."""
    whole = count - count % 4
    for j in range(len(query)):
        q = query[j]
        for n in range(0, whole, 4):
            r0, r1, r2, r3 = rows[n], rows[n + 1], rows[n + 2], rows[n + 3]
            s0 = s1 = s2 = s3 = np.float32(0)
            for i in range(width):
                s0 += q[i] * r0[i]
                s1 += q[i] * r1[i]
                s2 += q[i] * r2[i]
                s3 += q[i] * r3[i]
            to[j, start + n], to[j, start + n + 1], to[j, start + n + 2], to[j, start + n + 3] = s0, s1, s2, s3
        for n in range(whole, count):
            r0, s0 = rows[n], np.float32(0)
            for i in range(width):
                s0 += q[i] * r0[i]
            to[j, start + n] = s0


@loop(cache=True)
def add_rows(weights: Any, rows: Any, start: Any, count: Any, to: Any) -> None:
    """to[j] += weights[j, start + n] * rows[n], four rows at a time."""
    whole = count - count % 4
    for j in range(len(weights)):
        s = to[j]
        for n in range(0, whole, 4):
            r0, r1, r2, r3 = rows[n], rows[n + 1], rows[n + 2], rows[n + 3]
            w0, w1, w2, w3 = (
                weights[j, start + n],
                weights[j, start + n + 1],
                weights[j, start + n + 2],
                weights[j, start + n + 3],
            )
            for i in range(len(s)):
                s[i] += w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i]
        for n in range(whole, count):
            r0, w0 = rows[n], weights[j, start + n]
            for i in range(len(s)):
                s[i] += w0 * r0[i]


@njit(nogil=True, cache=True)
def _read(side: Any, b: Any, h: Any, start: Any, count: Any, rows: Any) -> None:
    """Numbers of some stored slots."""
    end, width = start + count, side.width
    if side.kind == PLAIN:
        _numbers(side.plain[b, h, start:end], side.half, rows)
        return
    codes = side.codes[b, h, start:end]
    if side.kind == TOKEN:
        _of_tokens(codes, side.scale[b, h, start:end], side.low[b, h, start:end], side.bits, side.coded, width, rows)
    elif side.kind == CHANNEL:
        member = side.member[b, h, start:end]
        _of_channels(codes, member, side.scale[b, h], side.low[b, h], side.bits, side.coded, rows)
    elif side.kind == FLOAT:
        _floats(codes, side.scale[b, h, start:end], side.coded, rows)
    else:
        _blocks(codes, side.exponent[b, h, start:end], side.bits, width, rows)


@njit(nogil=True, cache=True)
def _numbers(x: Any, half: Any, rows: Any) -> None:
    for n in range(len(x)):
        read_row(x[n], half, rows[n])


@njit(nogil=True, cache=True, fastmath={"contract"})
def _of_tokens(codes: Any, scale: Any, low: Any, bits: Any, coded: Any, width: Any, rows: Any) -> None:
    size = width // scale.shape[1]
    for n in range(len(codes)):
        unpack_row(codes[n], bits, rows[n])
        for g in range(scale.shape[1]):
            part, factor, first = rows[n, g * size : (g + 1) * size], number(scale[n, g], coded), number(low[n, g], coded)
            for i in range(size):
                part[i] = first + part[i] * factor


@njit(nogil=True, cache=True, fastmath={"contract"})
def _of_channels(codes: Any, member: Any, scale: Any, low: Any, bits: Any, coded: Any, rows: Any) -> None:
    width, known = scale.shape[1], -1
    factor, first = np.empty(width, np.float32), np.empty(width, np.float32)
    for n in range(len(codes)):
        if member[n, 0] != known:
            known = np.int64(member[n, 0])
            for i in range(width):
                factor[i], first[i] = number(scale[known, i], coded), number(low[known, i], coded)
        to = rows[n]
        unpack_row(codes[n], bits, to)
        for i in range(width):
            to[i] = first[i] + to[i] * factor[i]


@njit(nogil=True, cache=True, fastmath={"contract"})
def _floats(codes: Any, scale: Any, coded: Any, rows: Any) -> None:
    """E4M3 has 7 for its exponent's zero, float32 has 127; a subnormal number comes out right as well."""
    for n in range(len(codes)):
        part, to, factor = codes[n], rows[n], number(scale[n, 0], coded) * np.float32(2.0**120)
        for i in range(len(part)):
            bits = np.uint32(part[i])
            sign, rest = (bits & np.uint32(0x80)) << np.uint32(24), (bits & np.uint32(0x7F)) << np.uint32(20)
            to[i] = np.uint32(sign | rest).view(np.float32) * factor


@njit(nogil=True, cache=True, fastmath={"contract"})
def _blocks(codes: Any, exponent: Any, bits: Any, width: Any, rows: Any) -> None:
    size, middle = width // exponent.shape[1], np.float32((1 << bits - 1) - 1)
    for n in range(len(codes)):
        unpack_row(codes[n], bits, rows[n])
        for g in range(exponent.shape[1]):
            part, power = rows[n, g * size : (g + 1) * size], np.int32(exponent[n, g])
            factor = np.int32((power + 127) << 23).view(np.float32) if power > -127 else np.float32(2.0**-127)
            for i in range(size):
                part[i] = (part[i] - middle) * factor


@njit(nogil=True, cache=True)
def weigh(x: Any, positions: Any, sight: Any, b: Any) -> None:
    """Logits of row `b` to shares, in place: of the slots at `positions` that its query sees, 0 where it sees none."""
    if not len(sight.asked) or hide(x, positions, sight.asked[b], sight.window):
        softmax(x)
    else:
        x[:] = 0


@njit(nogil=True, cache=True)
def softmax(x: Any) -> None:
    """Of a row float32 [S], in place."""
    top = _largest(x)
    for i in range(len(x)):
        x[i] = _exp(x[i] - top)
    total = np.float32(1) / _total(x)
    for i in range(len(x)):
        x[i] *= total


@njit(nogil=True, cache=True)
def hide(x: Any, positions: Any, asked: Any, window: Any) -> Any:
    """Minus infinity where a query at position `asked` sees nothing; whether it sees anything."""
    some = False
    for i in range(len(x)):
        if positions[i] >= 0 and positions[i] <= asked and (window == 0 or positions[i] > asked - window):
            some = True
        else:
            x[i] = -np.inf
    return some


@njit(inline="always")
def _exp(x: Any) -> Any:
    """exp of a float32 up to 0, within two units of the last place; 0 below -87. Arithmetic only, so loops become vectors."""
    x = max(x, np.float32(-104.0))
    whole = np.rint(x * np.float32(1.44269504))
    rest = (x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * rest + np.float32(1.3981999507e-3)
    y = y * rest + np.float32(8.3334519073e-3)
    y = y * rest + np.float32(4.1665795894e-2)
    y = y * rest + np.float32(1.6666665459e-1)
    y = y * rest + np.float32(5.0000001201e-1)
    y = y * rest * rest + rest + np.float32(1)
    power = np.int32(max(whole, np.float32(-127))) + np.int32(127)
    return y * np.int32(power << np.int32(23)).view(np.float32)


@njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _largest(x: Any) -> Any:
    top = x[0]
    for i in range(len(x)):
        top = max(top, x[i])
    return top


@njit(cache=True, fastmath={"nsz", "reassoc"})
def _total(x: Any) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total
