"""The block formats of ggml, the library of llama.cpp: where each bit lies, and what the bits mean.

A row of weights is cut into blocks of 32 or 256, each of a fixed number of bytes. A block holds a scale `d` (fp16),
in some kinds a second one `m`, in the kinds of 256 weights small integers that multiply them in groups of 16 or 32
weights, and codes. A code is a step of a grid, an entry of a table, or the place of a vector of 4 or 8 magnitudes in
a codebook, whose signs are stored beside it:

    weight = d * unit * sub * step - m * min        (q4_1 and q5_1: + m)

Facts are data here: a field is a list of segments of bits, and one reader and one writer serve every kind but tq1_0,
whose digits are in base 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Segment(NamedTuple):
    """`bits` bits of every entry of a field: those of byte[i] of the block from shift[i] on."""

    byte: NDArray[np.int64]
    shift: NDArray[np.int64]
    bits: int


Field = tuple[Segment, ...]
"""From the lowest bits of an entry to its highest."""


@dataclass(frozen=True)
class Kind:
    """One block format.

    weights, nbytes: of a block; group: weights that share a sub-scale; fields: "d", "m", "subs", "mins", "codes", "signs",
    as far as the kind has them; vector: weights that one code stands for; zero: the code of step 0; table: step of each
    code, if they are not evenly spaced; sub: (a, b) of a stored sub-scale s that means a s + b; unit: see the module;
    min_sign: of `m`; even: an eighth sign makes the number of minus signs in 8 weights even.
    """

    weights: int
    nbytes: int
    fields: Mapping[str, Field]
    group: int = 0
    vector: int = 1
    zero: int = 0
    table: tuple[int, ...] = ()
    sub: tuple[int, int] = (1, 0)
    unit: float = 1.0
    min_sign: int = -1
    even: bool = False
    codebook: str = ""
    widths: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or self.weights)
        object.__setattr__(self, "widths", {name: sum(s.bits for s in f) for name, f in self.fields.items()})

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights

    @property
    def run(self) -> int:
        """Weights whose codes depend on each other."""
        return 8 if self.even else self.vector

    def columns(self, nbytes: int) -> int:
        """Weights of a row of so many bytes."""
        return nbytes // self.nbytes * self.weights


class Parts(NamedTuple):
    """What blocks of [..., in] weights hold. Groups and blocks are counted along whole rows.

    d, m: float32 [..., blocks], exact in fp16; subs, mins: int16 [..., groups], what d and m are multiplied with; codes:
    int16 [..., in / vector]; signs: bool [..., in], True for negative. None where the kind has no such thing.
    """

    d: Tensor
    codes: Tensor
    m: Tensor | None = None
    subs: Tensor | None = None
    mins: Tensor | None = None
    signs: Tensor | None = None


# ---- layouts ---------------------------------------------------------------------------------

Place = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def _segment(count: int, bits: int, byte: Place, shift: Place | int = 0) -> Segment:
    i = np.arange(count, dtype=np.int64)
    return Segment(byte(i), np.full(count, shift) if isinstance(shift, int) else shift(i), bits)


def _half(at: int) -> Field:
    """An fp16 number."""
    return tuple(_segment(1, 8, lambda i, k=k: i + at + k) for k in range(2))  # type: ignore[misc]


def _halves(at: int, count: int, run: int) -> Segment:
    """Nibbles in runs: the low ones of `run` bytes, then their high ones."""
    return _segment(count, 4, lambda i: at + i // (2 * run) * run + i % run, lambda i: i // run % 2 * 4)


def _quarters(at: int) -> Segment:
    """Pairs of bits of 256 weights: the lowest pairs of 32 bytes, then their next ones."""
    return _segment(256, 2, lambda i: at + i // 128 * 32 + i % 32, lambda i: i % 128 // 32 * 2)


def _nibbles(at: int, count: int) -> Segment:
    return _segment(count, 4, lambda i: at + i // 2, lambda i: i % 2 * 4)


def _bits(at: int, count: int) -> Segment:
    """Single bits in order."""
    return _segment(count, 1, lambda i: at + i // 8, lambda i: i % 8)


def _bytes(at: int, count: int) -> Segment:
    return _segment(count, 8, lambda i: at + i)


def _seven_signs(at: int, stride: int) -> Field:
    """Seven bits of each of 32 vectors, four vectors in a word of 32 bits every `stride` bytes."""
    return tuple(
        _segment(32, 1, lambda i, b=b: at + i // 4 * stride + (i % 4 * 7 + b) // 8, lambda i, b=b: (i % 4 * 7 + b) % 8)  # type: ignore[misc]
        for b in range(7)
    )


def _k_scales(at: int, second: bool) -> Field:
    """Eight 6-bit numbers of q4_k and q5_k: the sub-scales, or the mins, which lie among them in 12 bytes."""
    late = 4 if second else 0
    low = _segment(8, 4, lambda i: at + i + np.where(i < 4, late, 4), lambda i: np.where(i < 4, 0, late))
    high = _segment(8, 2, lambda i: at + np.where(i < 4, i + late, i - 4 + late), lambda i: np.where(i < 4, 4, 6))
    return low, high


def _q3_scales(at: int) -> Field:
    low = _segment(16, 4, lambda i: at + i % 8, lambda i: i // 8 * 4)
    return low, _segment(16, 2, lambda i: at + 8 + i % 4, lambda i: i // 4 * 2)


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""E2M1, doubled."""

KINDS: dict[str, Kind] = {
    "bf16": Kind(1, 2, {"codes": (_bytes(0, 1), _bytes(1, 1))}),
    "f16": Kind(1, 2, {"codes": (_bytes(0, 1), _bytes(1, 1))}),
    "q8_0": Kind(32, 34, {"d": _half(0), "codes": (_bytes(2, 32),)}, zero=128),
    "q4_0": Kind(32, 18, {"d": _half(0), "codes": (_halves(2, 32, 16),)}, zero=8),
    "q4_1": Kind(32, 20, {"d": _half(0), "m": _half(2), "codes": (_halves(4, 32, 16),)}, min_sign=1),
    "q5_0": Kind(32, 22, {"d": _half(0), "codes": (_halves(6, 32, 16), _bits(2, 32))}, zero=16),
    "q5_1": Kind(32, 24, {"d": _half(0), "m": _half(2), "codes": (_halves(8, 32, 16), _bits(4, 32))}, min_sign=1),
    "q6_k": Kind(256, 210, {
        "d": _half(208), "subs": (_bytes(192, 16),),
        "codes": (_segment(256, 4, lambda i: i // 128 * 64 + i % 64, lambda i: i % 128 // 64 * 4), _quarters(128)),
    }, group=16, zero=32),
    "q5_k": Kind(256, 176, {
        "d": _half(0), "m": _half(2), "subs": _k_scales(4, False), "mins": _k_scales(4, True),
        "codes": (_halves(48, 256, 32), _segment(256, 1, lambda i: 16 + i % 32, lambda i: i // 32)),
    }, group=32),
    "q4_k": Kind(256, 144, {
        "d": _half(0), "m": _half(2), "subs": _k_scales(4, False), "mins": _k_scales(4, True), "codes": (_halves(16, 256, 32),),
    }, group=32),
    "q3_k": Kind(256, 110, {
        "d": _half(108), "subs": _q3_scales(96),
        "codes": (_quarters(32), _segment(256, 1, lambda i: i % 32, lambda i: i // 32)),
    }, group=16, zero=4, sub=(1, -32)),
    "q2_k": Kind(256, 84, {
        "d": _half(80), "m": _half(82), "subs": (_segment(16, 4, lambda i: i),), "mins": (_segment(16, 4, lambda i: i, 4),),
        "codes": (_quarters(16),),
    }, group=16),
    "iq4_nl": Kind(32, 18, {"d": _half(0), "codes": (_halves(2, 32, 16),)}, table=IQ4),
    "iq4_xs": Kind(256, 136, {
        "d": _half(0), "subs": (_nibbles(4, 8), _segment(8, 2, lambda i: 2 + i // 4, lambda i: i % 4 * 2)),
        "codes": (_halves(8, 256, 16),),
    }, group=32, table=IQ4, sub=(1, -32)),
    "iq3_s": Kind(256, 110, {
        "d": _half(0), "codes": (_bytes(2, 64), _bits(66, 64)), "signs": tuple(
            _segment(32, 1, lambda i: 74 + i, b) for b in range(8)), "subs": (_nibbles(106, 8),),
    }, group=32, vector=4, sub=(2, 1), codebook="IQ3_S"),
    "iq3_xxs": Kind(256, 98, {
        "d": _half(0), "codes": (_bytes(2, 64),), "signs": _seven_signs(66, 4),
        "subs": (_segment(8, 4, lambda i: 69 + 4 * i, 4),),
    }, group=32, vector=4, sub=(2, 1), unit=1 / 4, even=True, codebook="IQ3_XXS"),
    "iq2_s": Kind(256, 82, {
        "d": _half(0), "codes": (_bytes(2, 32), _segment(32, 2, lambda i: 66 + i // 4, lambda i: i % 4 * 2)),
        "signs": (_bytes(34, 32),), "subs": (_nibbles(74, 16),),
    }, group=16, vector=8, sub=(2, 1), unit=1 / 8, codebook="IQ2_S"),
    "iq2_xs": Kind(256, 74, {
        "d": _half(0), "codes": (_segment(32, 8, lambda i: 2 + 2 * i), _segment(32, 1, lambda i: 3 + 2 * i)),
        "signs": (_segment(32, 7, lambda i: 3 + 2 * i, 1),), "subs": (_nibbles(66, 16),),
    }, group=16, vector=8, sub=(2, 1), unit=1 / 8, even=True, codebook="IQ2_XS"),
    "iq2_xxs": Kind(256, 66, {
        "d": _half(0), "codes": (_segment(32, 8, lambda i: 2 + i // 4 * 8 + i % 4),), "signs": _seven_signs(6, 8),
        "subs": (_segment(8, 4, lambda i: 9 + 8 * i, 4),),
    }, group=32, vector=8, sub=(2, 1), unit=1 / 8, even=True, codebook="IQ2_XXS"),
    "tq1_0": Kind(256, 54, {"d": _half(52)}, zero=1),
    "tq2_0": Kind(256, 66, {"d": _half(64), "codes": (_quarters(0),)}, zero=1),
    "mxfp4": Kind(32, 17, {"d": (_bytes(0, 1),), "codes": (_halves(1, 32, 16),)}, table=FP4),
}  # fmt: skip


# ---- bits ------------------------------------------------------------------------------------


def unpack(kind: str, rows: Tensor) -> Parts:
    """What the bytes [..., bytes per row] (uint8) of rows of a kind hold."""
    facts = KINDS[kind]
    blocks = rows.unflatten(-1, (-1, facts.nbytes))
    found = {name: _read(blocks, segments) for name, segments in facts.fields.items()}
    if kind in ("f16", "bf16"):
        return Parts(torch.ones_like(found["codes"][..., 0], dtype=torch.float32), _narrow(found["codes"]).flatten(-2))
    codes = _read_base_3(blocks) if kind == "tq1_0" else found["codes"]
    if kind == "q8_0":
        codes = codes ^ 128
    d = _power(found["d"]) if kind == "mxfp4" else _narrow(found["d"]).view(torch.float16).float()
    subs, mins, signs, m = (found.get(name) for name in ("subs", "mins", "signs", "m"))
    if subs is not None:
        subs = subs - (subs & 128) * 2 if kind == "q6_k" else facts.sub[0] * subs + facts.sub[1]
    return Parts(
        d[..., 0],
        codes.short().flatten(-2),
        None if m is None else _narrow(m).view(torch.float16).float()[..., 0],
        None if subs is None else subs.short().flatten(-2),
        None if mins is None else mins.short().flatten(-2),
        None if signs is None else _signs_of(signs, facts.even).flatten(-3),
    )


def pack(kind: str, parts: Parts) -> Tensor:
    """Inverse of `unpack`: bytes [..., bytes per row]."""
    facts = KINDS[kind]
    entries: dict[str, Tensor] = {}
    if kind not in ("f16", "bf16"):
        entries["d"] = _exponent(parts.d) if kind == "mxfp4" else _wide(parts.d.half())
    if parts.m is not None:
        entries["m"] = _wide(parts.m.half())
    per_block = {"codes": facts.weights // facts.vector, "subs": facts.weights // facts.group}
    entries["codes"] = parts.codes.int().unflatten(-1, (-1, per_block["codes"]))
    if kind == "q8_0":
        entries["codes"] = entries["codes"] ^ 128
    if parts.subs is not None:
        entries["subs"] = (parts.subs.int() - facts.sub[1]).div(facts.sub[0], rounding_mode="floor")
    if parts.mins is not None:
        entries["mins"] = parts.mins.int()
    for name in ("subs", "mins"):
        if name in entries:
            entries[name] = entries[name].unflatten(-1, (-1, per_block["subs"]))
    if parts.signs is not None:
        weights = 2 ** torch.arange(8, dtype=torch.int32)
        entries["signs"] = (parts.signs.unflatten(-1, (-1, facts.weights // 8, 8)).int() * weights).sum(-1, dtype=torch.int32)
    blocks = torch.zeros(*entries["codes"].shape[:-1], facts.nbytes, dtype=torch.int32)
    for name, segments in facts.fields.items():
        _write(blocks, segments, entries[name])
    if kind == "tq1_0":
        _write_base_3(blocks, entries["codes"])
    return blocks.to(torch.uint8).flatten(-2)


def _read(blocks: Tensor, segments: Field) -> Tensor:
    """Entries (int32) [..., count] of a field of blocks [..., bytes]."""
    found, at = torch.zeros((), dtype=torch.int32), 0
    for byte, shift, bits in segments:
        part = (blocks[..., torch.from_numpy(byte)].int() >> torch.from_numpy(shift).int()) & ((1 << bits) - 1)
        found, at = found + (part << at), at + bits
    return found


def _write(blocks: Tensor, segments: Field, entries: Tensor) -> None:
    """Put entries into blocks (int32, one number a byte), whose bits there are 0."""
    at = 0
    for byte, shift, bits in segments:
        part = ((entries >> at) & ((1 << bits) - 1)) << torch.from_numpy(shift).int()
        blocks.index_add_(-1, torch.from_numpy(byte), part.expand(*blocks.shape[:-1], len(byte)))
        at += bits


def _narrow(entries: Tensor) -> Tensor:
    """16 bits as int16."""
    return (entries - ((entries & 0x8000) << 1)).short()


def _wide(numbers: Tensor) -> Tensor:
    """The bits of fp16 numbers [...] as entries [..., 1]."""
    return (numbers.contiguous().view(torch.int16).int() & 0xFFFF)[..., None]


def _power(exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.double() - 128).float()


def _exponent(numbers: Tensor) -> Tensor:
    return (torch.log2(numbers.double()).round().int() + 128)[..., None]


def _signs_of(entries: Tensor, even: bool) -> Tensor:
    """bool [..., vectors, 8] from numbers of 8 bits, or of 7 if an eighth makes them even."""
    bits = ((entries[..., None] >> torch.arange(8, dtype=torch.int32)) & 1).bool()
    if even:
        bits[..., 7] = bits[..., :7].sum(-1) % 2 == 1
    return bits


def _digits() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(byte, which digit) of each of tq1_0's 256 weights."""
    i = np.arange(256)
    late, last = i - 160, i - 240
    byte = np.where(i < 160, i % 32, np.where(i < 240, 32 + late % 16, 48 + last % 4))
    return byte, np.where(i < 160, i // 32, np.where(i < 240, late // 16, last // 4))


def _read_base_3(blocks: Tensor) -> Tensor:
    """A byte b stands for the fraction b / 256; its digits in base 3 are the codes."""
    byte, digit = (torch.from_numpy(x) for x in _digits())
    rest = (blocks[..., byte].int() * 3 ** digit.int()) & 255
    return (rest * 3) >> 8


def _write_base_3(blocks: Tensor, codes: Tensor) -> None:
    byte, digit = (torch.from_numpy(x) for x in _digits())
    sums = torch.zeros_like(blocks).index_add_(-1, byte, codes * (3 ** (4 - digit.int())))
    blocks[..., :52] += ((sums * 256 + 242) // 243)[..., :52]


# ---- meaning ---------------------------------------------------------------------------------


def scale(kind: str, parts: Parts) -> Tensor:
    """What steps are multiplied with, float32 [..., groups]; exact."""
    facts = KINDS[kind]
    if parts.subs is None:
        return parts.d * facts.unit
    spread = parts.d.repeat_interleave(facts.weights // facts.group, -1)
    return spread * facts.unit * parts.subs


def offset(kind: str, parts: Parts) -> Tensor | None:
    """What is added to every weight of a group, float32 [..., groups]; exact."""
    facts = KINDS[kind]
    if parts.m is None:
        return None
    if parts.mins is None:
        return facts.min_sign * parts.m
    return facts.min_sign * parts.m.repeat_interleave(facts.weights // facts.group, -1) * parts.mins


def steps(kind: str, parts: Parts) -> Tensor:
    """Unscaled weights, float32 [..., in]."""
    facts = KINDS[kind]
    if facts.codebook:
        assert parts.signs is not None
        magnitudes = codebook(kind)[parts.codes.long()].flatten(-2)
        return torch.where(parts.signs, -magnitudes, magnitudes)
    if facts.table:
        return torch.tensor(facts.table, dtype=torch.float32)[parts.codes.long()]
    return (parts.codes - facts.zero).float()


def values(kind: str, parts: Parts) -> Tensor:
    """The weights, float32 [..., in]; at most one rounding, of the last sum."""
    if kind in ("f16", "bf16"):
        return parts.codes.contiguous().view(torch.float16 if kind == "f16" else torch.bfloat16).float()
    groups = KINDS[kind].group
    weights = steps(kind, parts).unflatten(-1, (-1, groups)) * scale(kind, parts)[..., None]
    added = offset(kind, parts)
    return (weights if added is None else weights + added[..., None]).flatten(-2)


@lru_cache(maxsize=8)
def codebook(kind: str) -> Tensor:
    """Magnitudes of each code's vector, float32 [codes, vector], as the gguf package lists them."""
    from gguf import quants  # takes a tenth of a second, which few runs need

    table = getattr(quants, KINDS[kind].codebook)
    table.init_grid()
    return torch.from_numpy(np.array(table.grid, dtype=np.float32)).reshape(table.grid_shape)
