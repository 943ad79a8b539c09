"""Codes of a cache back to numbers on CPUs, compiled; `codecs` holds the same in torch, which other devices run.

In torch every step of unpacking is a pass over memory and a call; here a token's codes are read once. Tensors are views
[B, H, n, ...] of larger ones whose last axis is dense: a kernel gets the storage, an offset and strides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.threads import spread
from assay.runtime.grown import HALVES


def runs_on(*tensors: Tensor) -> bool:
    """Whether the kernels take these; elsewhere the torch definitions do the work."""
    return all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def per_token(codes: Tensor, scale: Tensor, low: Tensor, bits: int, width: int) -> Tensor:
    """float32 [B, H, n, width] = low + code * scale; codes uint8 [B, H, n, bytes], scale and low 16-bit [B, H, n, groups]."""
    out = torch.empty(*codes.shape[:3], width)
    shared = (*flat(codes), *flat(scale), *flat(low), bits, HALVES[scale.dtype], scale.shape[-1])
    _spread(_per_token, out, shared)
    return out


def per_channel(codes: Tensor, group: Tensor, scale: Tensor, low: Tensor, bits: int, width: int) -> Tensor:
    """float32 [B, H, n, width]; group int [B, H, n, 1]: which of scale and low, 16-bit [B, H, groups, width]."""
    out = torch.empty(*codes.shape[:3], width)
    shared = (*flat(codes), *flat(group), *flat(scale), *flat(low), bits, HALVES[scale.dtype])
    _spread(_per_channel, out, shared)
    return out


def by_table(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """float32 [B, H, n, width] = table[code] * scale; codes uint8, scale 16-bit [B, H, n, 1], table float32 [256]."""
    out = torch.empty(codes.shape)
    _spread(_by_table, out, (*flat(codes), *flat(scale), HALVES[scale.dtype], table.numpy()))
    return out


def _spread(kernel: Any, out: Tensor, shared: tuple[Any, ...]) -> None:
    rows, heads = out.shape[:2]
    order = torch.arange(rows * heads, dtype=torch.int64)
    spread(kernel, rows * heads, (*shared, heads), (order, out.view(rows * heads, *out.shape[2:])))


def flat(x: Tensor) -> tuple[Any, Any]:
    """The storage as one row of numbers, and where [b, h, t] begins: offset and three strides."""
    bits = x.view(torch.int16) if x.dtype in HALVES else x
    offset = bits.storage_offset()
    whole = bits.as_strided((bits.untyped_storage().nbytes() // bits.element_size(),), (1,), 0)
    return whole.numpy(), (offset, *bits.stride()[:3])


@njit(inline="always")
def number(half: Any, kind: Any) -> Any:
    """float32 from the 16 bits of a float16 (0) or bfloat16 (1), finite."""
    bits = np.uint32(half) & np.uint32(0xFFFF)
    if kind == 1:
        return np.uint32(bits << np.uint32(16)).view(np.float32)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    # the exponent's bias is 112 less; a subnormal number comes out right as well, because float32 has room for it
    return np.uint32(sign | ((bits & np.uint32(0x7FFF)) << np.uint32(13))).view(np.float32) * np.float32(2.0**112)


@njit(inline="always")
def read_row(part: Any, half: Any, to: Any) -> None:
    """to[i] = part[i], float32, or 16-bit floats by their bits: half 0 or 1 as in `number`, -1 for float32."""
    if half < 0:
        for i in range(len(part)):
            to[i] = part[i]
    else:
        for i in range(len(part)):
            to[i] = number(part[i], half)


@njit(inline="always")
def unpack_row(codes: Any, bits: Any, to: Any) -> None:
    """Codes of one token, run after run; slices that begin at 0 let the compiler use vectors."""
    count = len(codes)
    for j in range(8 // bits):
        part, shift, mask = to[j * count : (j + 1) * count], np.int32(bits * j), np.int32((1 << bits) - 1)
        for i in range(count):
            part[i] = np.float32((np.int32(codes[i]) >> shift) & mask)


@njit(inline="always")
def place(layout: Any, b: Any, h: Any, t: Any) -> Any:
    """Where [b, h, t] begins in what `flat` gives."""
    return layout[0] + b * layout[1] + h * layout[2] + t * layout[3]


@njit(nogil=True, cache=True)
def _per_token(codes: Any, cp: Any, scale: Any, sp: Any, low: Any, lp: Any, bits: Any, kind: Any, groups: Any, heads: Any,
               order: Any, out: Any) -> None:  # fmt: skip
    width = out.shape[2]
    size, count = width // groups, (width * bits + 7) // 8
    numbers = np.empty(8 * count, np.float32)
    for k in range(len(order)):
        b, h = order[k] // heads, order[k] % heads
        for t in range(out.shape[1]):
            start, s, z = place(cp, b, h, t), place(sp, b, h, t), place(lp, b, h, t)
            unpack_row(codes[start : start + count], bits, numbers)
            for g in range(groups):
                factor, first = number(scale[s + g], kind), number(low[z + g], kind)
                part, to = numbers[g * size : (g + 1) * size], out[k, t, g * size : (g + 1) * size]
                for i in range(size):
                    to[i] = first + part[i] * factor


@njit(nogil=True, cache=True)
def _per_channel(codes: Any, cp: Any, group: Any, gp: Any, scale: Any, sp: Any, low: Any, lp: Any, bits: Any, kind: Any,
                 heads: Any, order: Any, out: Any) -> None:  # fmt: skip
    width = out.shape[2]
    count = (width * bits + 7) // 8
    numbers, factor, first = np.empty(8 * count, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for k in range(len(order)):
        b, h, known = order[k] // heads, order[k] % heads, -1
        for t in range(out.shape[1]):
            member = np.int64(group[place(gp, b, h, t)])
            if member != known:
                s, z = place(sp, b, h, member), place(lp, b, h, member)
                for i in range(width):
                    factor[i], first[i] = number(scale[s + i], kind), number(low[z + i], kind)
                known = member
            start = place(cp, b, h, t)
            unpack_row(codes[start : start + count], bits, numbers)
            to = out[k, t]
            for i in range(width):
                to[i] = first[i] + numbers[i] * factor[i]


@njit(nogil=True, cache=True)
def _by_table(codes: Any, cp: Any, scale: Any, sp: Any, kind: Any, table: Any, heads: Any, order: Any, out: Any) -> None:
    width = out.shape[2]
    for k in range(len(order)):
        b, h = order[k] // heads, order[k] % heads
        for t in range(out.shape[1]):
            start = place(cp, b, h, t)
            part, factor, to = codes[start : start + width], number(scale[place(sp, b, h, t)], kind), out[k, t]
            for i in range(width):
                to[i] = table[part[i]] * factor
