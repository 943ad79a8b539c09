"""Numbers of a cache to codes on CPUs, compiled; `codecs` holds the same in torch, to the bit, for other devices and dtypes.

A few tokens at a time are written while text is generated: in torch that is fifty calls on next to nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

TINY = np.float32(2.0**-14)
LARGEST = np.float32(65504)


def runs_on(x: Tensor) -> bool:
    """Whether the kernels take x; elsewhere the torch definitions do the work."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad


def affine(x: Tensor, bits: int, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [B, H, n, bytes] of x [B, H, n, D]; scale, low float16 [B, H, n / tokens, D / channels] of its tiles."""
    shape = (*x.shape[:2], x.shape[2] // tokens, x.shape[3] // channels)
    codes = torch.zeros(*x.shape[:3], -(-x.shape[3] * bits // 8), dtype=torch.uint8)
    scale, low = (torch.empty(shape, dtype=torch.int16) for _ in range(2))
    numbers, written, steps, firsts = (t.flatten(0, 1).numpy() for t in (x.contiguous(), codes, scale, low))
    _affine(numbers, written, steps, firsts, bits, tokens, channels)
    return codes, scale.view(torch.float16), low.view(torch.float16)


def floats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes E4M3 uint8 [B, H, n, D] of x and float16 scales [B, H, n, 1]."""
    codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(*x.shape[:3], 1, dtype=torch.int16)
    _floats(*(t.flatten(0, 2).numpy() for t in (x.contiguous(), codes, scale)))
    return codes, scale.view(torch.float16)


@njit(inline="always")
def _stored(x: Any) -> Any:
    """`codecs.storable` of a float32 as 16 bits, and their value."""
    x = min(max(x, -LARGEST), LARGEST)
    if x != 0 and abs(x) < TINY:
        x = TINY if x > 0 else -TINY
    bits = np.uint32(np.float32(x).view(np.uint32))
    size = np.int64(bits & np.uint32(0x7FFFFFFF))
    near = (size + 0xFFF + ((size >> 13) & 1)) >> 13 if size else 0
    half = near - (112 << 10) if size else 0
    value = np.uint32(np.uint32(bits & np.uint32(0x80000000)) | np.uint32(near << 13)).view(np.float32)
    return np.int16(np.uint16(half | ((np.int64(bits) >> 16) & 0x8000))), value


@njit(nogil=True, cache=True)
def _affine(x: Any, codes: Any, scale: Any, low: Any, bits: Any, tokens: Any, channels: Any) -> None:
    count, top = codes.shape[2], np.float32((1 << bits) - 1)
    for k in range(scale.shape[0]):
        for m in range(scale.shape[1]):
            for g in range(scale.shape[2]):
                least = most = x[k, m * tokens, g * channels]
                for t in range(m * tokens, (m + 1) * tokens):
                    for i in range(g * channels, (g + 1) * channels):
                        least, most = min(least, x[k, t, i]), max(most, x[k, t, i])
                step = np.float32(most - least) / top
                scale[k, m, g], step = _stored(step if step > 0 else np.float32(1))
                low[k, m, g], first = _stored(least)
                for t in range(m * tokens, (m + 1) * tokens):
                    for i in range(g * channels, (g + 1) * channels):
                        code = min(max(np.rint((x[k, t, i] - first) / step), np.float32(0)), top)
                        codes[k, t, i % count] |= np.uint8(np.int64(code) << (bits * (i // count)))


@njit(nogil=True, cache=True)
def _floats(x: Any, codes: Any, scale: Any) -> None:
    for t in range(len(x)):
        most = np.float32(0)
        for i in range(x.shape[1]):
            most = max(most, abs(x[t, i]))
        scale[t, 0], step = _stored(max(most, np.float32(1e-12)) / np.float32(448))
        for i in range(x.shape[1]):
            y = min(max(x[t, i] / step, np.float32(-448)), np.float32(448))
            bits = np.int64(np.float32(abs(y)).view(np.uint32))
            if abs(y) < np.float32(2.0**-6):
                code = np.int64(np.rint(abs(y) * np.float32(512)))
            else:
                code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
            negative = np.float32(y).view(np.uint32) >> np.uint32(31)
            codes[t, i] = np.uint8(code | (np.int64(negative) << 7))
