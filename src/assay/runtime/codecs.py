"""How cached tensors are stored: maps that change or drop channels, and codecs that store a tensor in few bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from assay.runtime import packing, single, unpacking
from assay.runtime.attention import Step

Tensors = dict[str, Tensor]
"""Tensors by name. Of tokens: [B, H or 1, n, ...], gathered with them. Shared: [B, H, ...], fitted once or grown."""
WIDTHS = (1, 2, 4, 8)


class Map(Protocol):
    """Changes the channels of a tensor before it is stored: permuted, scaled, fewer, or the coordinates in a basis.

    positional: whether it reads `where`; joint: whether it stores all heads as one.
    """

    @property
    def positional(self) -> bool: ...

    @property
    def joint(self) -> bool: ...

    def fit(self, x: Tensor, step: Step) -> Tensors:
        """What it needs to know, from all tokens [B, H, S, D] at the end of the first prompt."""
        ...

    def forward(self, x: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """[B, H, n, D] -> what is stored. where: int [B, n], the text position of each token."""
        ...

    def backward(self, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """What is stored -> [B, H, n, D]."""
        ...

    def dual(self, query: Tensor, shared: Tensors) -> Tensor:
        """Queries [B, H, g, D] whose products with what is stored are those of `query` with what `backward` gives.

        Asked of maps only that are neither positional nor joint.
        """
        ...

    def products(self, query: Tensor, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """Queries [B, H, g, D] times what `backward` gives: [B, H, g, n]."""
        ...

    def summed(self, y: Tensor, shared: Tensors) -> Tensor:
        """What `backward` makes of weighted sums of what is stored, [B, H, g, r] -> [B, H, g, D].

        Asked of maps only that aren't positional.
        """
        ...


class Codec(Protocol):
    """Stores a tensor [B, H, n, D] in few bits; what it has written never changes.

    kind: how the kernel for single queries reads it (`single`), `single.NONE` where it can't; bits: of a number.
    """

    @property
    def kind(self) -> int: ...

    @property
    def bits(self) -> int: ...

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """Tensors of the tokens, and the shared ones with what these tokens add."""
        ...

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """Back to [B, H, n, width]."""
        ...


@dataclass(frozen=True)
class Side:
    """How the keys, or the values, of older tokens are stored.

    residual: latest tokens that stay exact; block: older ones are stored in multiples of it; running: also those that
    come after the prompt, not only those of the prompt; every: those are stored when so many have come.
    """

    maps: tuple[Map, ...] = ()
    codec: Codec | None = None
    residual: int = 0
    block: int = 1
    running: bool = True
    every: int = 1

    def ready(self, exact: int, prefill: bool, decoded: int) -> int:
        """How many of the tokens that are exact now, the oldest first, are to be stored; decoded: tokens since the prompt."""
        due = prefill or (self.running and decoded % self.every == 0)
        return max(exact - self.residual, 0) // self.block * self.block if due else 0


@dataclass(frozen=True)
class Plain:
    """Stores as it is; for maps without a codec."""

    kind: ClassVar[int] = single.PLAIN
    bits: ClassVar[int] = 0

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See `Codec`."""
        return {"x": x}, shared

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        return tokens["x"].to(dtype)


@dataclass(frozen=True)
class PerToken:
    """Asymmetric integers, a scale for each group of consecutive channels of a token (the values of KIVI, 2024)."""

    bits: int
    group: int

    kind: ClassVar[int] = single.TOKEN

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See `Codec`."""
        size = fitting(self.group, x.shape[-1])
        if packing.runs_on(x):
            return dict(zip(("codes", "scale", "low"), packing.affine(x, self.bits, 1, size), strict=True)), shared
        parts = x.unflatten(-1, (-1, size))
        scale, low = affine(parts, -1, self.bits)
        return {"codes": pack(quantized(parts, scale, low, self.bits).flatten(-2), self.bits),
                "scale": scale[..., 0], "low": low[..., 0]}, shared  # fmt: skip

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        return _groups(tokens["codes"], tokens["scale"], tokens["low"], self.bits, width).to(dtype)


@dataclass(frozen=True)
class PerChannel:
    """Asymmetric integers, a scale for each channel of `group` consecutive tokens (the keys of KIVI, 2024).

    Each token knows its group, so tokens can be dropped one by one and the codes of the others stay.
    """

    bits: int
    group: int

    kind: ClassVar[int] = single.CHANNEL

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See `Codec`; n must be a multiple of the group."""
        if packing.runs_on(x):
            codes, scale, low = packing.affine(x, self.bits, self.group, 1)
        else:
            parts = x.unflatten(2, (-1, self.group))
            scale, low = affine(parts, 3, self.bits)
            codes = pack(quantized(parts, scale, low, self.bits).flatten(2, 3), self.bits)
            scale, low = scale[:, :, :, 0], low[:, :, :, 0]
        before, count = shared["scale"].shape[2] if "scale" in shared else 0, scale.shape[2]
        ids = before + torch.arange(count, device=x.device).repeat_interleave(self.group)
        grown = {"scale": scale, "low": low}
        if before:
            grown = {name: torch.cat([shared[name], part], 2) for name, part in grown.items()}
        members = ids.to(torch.int16 if before + count < 1 << 15 else torch.int32)
        return {"codes": codes, "group": members[None, None, :, None].expand(*x.shape[:3], 1).contiguous()}, shared | grown

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        parts = tokens["codes"], tokens["group"], shared["scale"], shared["low"]
        if unpacking.runs_on(*parts):
            return unpacking.per_channel(*parts, self.bits, width).to(dtype)
        index = tokens["group"].long().expand(-1, -1, -1, width)
        scale, low = (shared[name].gather(2, index).float() for name in ("scale", "low"))
        return torch.addcmul(low, unpack(tokens["codes"], self.bits, width).float(), scale).to(dtype)


@dataclass(frozen=True)
class Float8:
    """E4M3 floats with one scale for each token: 8 bits and 16 for the scale."""

    dtype: torch.dtype = field(default=torch.float8_e4m3fn)

    bits: ClassVar[int] = 8

    @property
    def kind(self) -> int:
        """See `Codec`."""
        return single.FLOAT if self.dtype == torch.float8_e4m3fn else single.NONE

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See `Codec`."""
        if packing.runs_on(x) and self.dtype == torch.float8_e4m3fn:
            return dict(zip(("codes", "scale"), packing.floats(x), strict=True)), shared
        largest = torch.finfo(self.dtype).max
        scale = storable(x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest, x.dtype)
        return {
            "codes": (x.float() / scale.float()).clamp(-largest, largest).to(self.dtype).view(torch.uint8),
            "scale": scale,
        }, shared

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        codes, scale = tokens["codes"], tokens["scale"]
        if unpacking.runs_on(codes, scale):
            table = torch.arange(256, dtype=torch.uint8).view(self.dtype).float()
            return unpacking.by_table(codes, scale, table).to(dtype)
        return (codes.view(self.dtype).float() * scale.float()).to(dtype)


@dataclass(frozen=True)
class BlockFloat:
    """Block floating point: signed integers of `bits` that share an exponent of one byte in each block of channels."""

    bits: int
    block: int

    kind: ClassVar[int] = single.BLOCK

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See `Codec`."""
        parts = x.float().unflatten(-1, (-1, fitting(self.block, x.shape[-1])))
        top = (1 << self.bits - 1) - 1
        largest = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        exponent = (largest / top).log2().ceil().clamp(-127, 127)
        codes = (parts / exponent.exp2()).round().clamp(-top, top) + top
        return {"codes": pack(codes.to(torch.uint8).flatten(-2), self.bits), "exponent": exponent[..., 0].to(torch.int8)}, shared

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        # a power of two and its multiples by up to 127 are exact in bfloat16
        scale = tokens["exponent"].float().exp2().bfloat16()
        return _groups(tokens["codes"], scale, scale * -((1 << self.bits - 1) - 1), self.bits, width).to(dtype)


def _groups(codes: Tensor, scale: Tensor, low: Tensor, bits: int, width: int) -> Tensor:
    """float32 [B, H, n, width] from codes with a scale and a lowest value [B, H, n, groups] for consecutive channels."""
    if unpacking.runs_on(codes, scale, low):
        return unpacking.per_token(codes, scale, low, bits, width)
    parts = unpack(codes, bits, width).float().unflatten(-1, (scale.shape[-1], -1))
    return torch.addcmul(low.float()[..., None], parts, scale.float()[..., None]).flatten(-2)


@dataclass(frozen=True)
class GgmlBlocks:
    """llama.cpp's cache types of 8 or 4 bits, q8_0 and q4_0: a 16-bit scale for 32 consecutive channels of a token."""

    bits: int
    block: int = 32

    kind: ClassVar[int] = single.NONE

    def encode(self, x: Tensor, shared: Tensors) -> tuple[Tensors, Tensors]:
        """See `Codec`. Four bits reach one step further on the side of the largest number."""
        parts, half = x.float().unflatten(-1, (-1, fitting(self.block, x.shape[-1]))), 1 << self.bits - 1
        largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
        exact = largest.abs() / 127 if self.bits == 8 else -largest / half
        scale = storable(exact, torch.float16)
        codes = (parts * torch.where(exact == 0, 0.0, 1 / exact)).round().clamp(1 - half if self.bits == 8 else -half, half - 1)
        return {"codes": pack((codes + half).to(torch.uint8).flatten(-2), self.bits), "scale": scale[..., 0]}, shared

    def decode(self, tokens: Tensors, shared: Tensors, width: int, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        codes = unpack(tokens["codes"], self.bits, width).float() - (1 << self.bits - 1)
        scale = tokens["scale"].float()
        return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(dtype)


def affine(x: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and lowest value of x along an axis, which is kept with length 1, in x's dtype (float16 for float32).

    Equal values get scale 1, so that they decode to themselves.
    """
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale = (high - low).float() / ((1 << bits) - 1)
    return storable(torch.where(scale > 0, scale, 1.0), x.dtype), storable(low, x.dtype)


def storable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in 16 bits: those of the model's dtype, float16 where it has 32; within the range of that dtype."""
    half = dtype if dtype.itemsize == 2 else torch.float16
    limits = torch.finfo(half)
    bounded = x.float().clamp(limits.min, limits.max)
    return torch.where((bounded != 0) & (bounded.abs() < limits.tiny), bounded.sign() * limits.tiny, bounded).to(half)


def quantized(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """Codes uint8 of x on the grid low + scale * code."""
    return ((x.float() - low.float()) / scale.float()).round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)


def fitting(group: int, width: int) -> int:
    """The largest divisor of the width that is at most `group`."""
    return next(size for size in range(min(group, width), 0, -1) if width % size == 0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] below 2**bits -> uint8 [..., ceil(n * bits / 8)]; bits 1, 2, 4 or 8.

    The codes are cut into 8 / bits runs, the first in the lowest bits of the bytes: so runs unpack as vectors.
    """
    if bits == 8:
        return codes
    each = 8 // bits
    runs = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (each, -1))
    packed = runs[..., 0, :].clone()
    for i in range(1, each):
        packed |= runs[..., i, :] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 [..., bytes] -> uint8 [..., count]."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1)[..., :count]
