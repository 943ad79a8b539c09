"""Huffman coding of bytes: canonical codes, in chunks that are written and read independently.

A code is its 256 lengths. Symbols are cut into chunks of `CHUNK`; the codes of a chunk follow each other, most
significant bit first, and zeros fill its last byte. So the auxiliary data are 2 bytes a chunk, its size.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from assay.model.errors import InputError
from assay.model.threads import spread

LONGEST = 32
CHUNK = 2048  # times 4 bytes must fit in int16
AGAIN = "the file is damaged: download or make it again"
_PEEK = 12


def code_lengths(counts: Tensor, longest: int = LONGEST) -> Tensor:
    """Lengths uint8 [symbols] of a Huffman code for symbols that occur `counts` times, int64 [symbols]; 0 = no code.

    While a code is longer than `longest` the rarest 2, 3, ... symbols count as one each (DFloat11: "70% Size, 100%
    Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float", 2025). A symbol that is
    alone gets one bit. Raises ValueError if `longest` bits can't tell the symbols apart.
    """
    occurring = sorted((count, symbol) for symbol, count in enumerate(counts.tolist()) if count)
    if len(occurring) > 1 << longest:
        raise ValueError(f"{len(occurring)} symbols need codes of more than {longest} bits")
    frequencies = [count for count, _ in occurring]
    found, levelled = _merge(frequencies), 1
    while max(found, default=0) > longest:
        levelled += 1
        found = _merge([1] * levelled + frequencies[levelled:])
    lengths = torch.zeros(len(counts), dtype=torch.uint8)
    lengths[[symbol for _, symbol in occurring]] = torch.tensor(found, dtype=torch.uint8)
    return lengths


def _merge(frequencies: list[int]) -> list[int]:
    """Depth of each leaf of the Huffman tree, at least 1."""
    heap = [(frequency, leaf) for leaf, frequency in enumerate(frequencies)]
    heapq.heapify(heap)
    parents = [0] * (2 * len(frequencies) - 1)
    for node in range(len(frequencies), len(parents)):
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        parents[one[1]] = parents[other[1]] = node
        heapq.heappush(heap, (one[0] + other[0], node))
    depths = [0] * len(parents)
    for node in reversed(range(len(parents) - 1)):
        depths[node] = depths[parents[node]] + 1
    return [max(depth, 1) for depth in depths[: len(frequencies)]]


def _ordered(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols in canonical order, their lengths, and their codes moved to the top of `LONGEST` bits; int64 [used]."""
    order = lengths.argsort(stable=True)[int((lengths == 0).sum()) :]
    sorted_lengths = lengths[order].long()
    widths = torch.bitwise_left_shift(torch.ones_like(order), LONGEST - sorted_lengths)
    return order, sorted_lengths, widths.cumsum(0) - widths


def canonical_codes(lengths: Tensor) -> Tensor:
    """Codes int64 [symbols] of lengths uint8 [symbols], in their low bits: shorter codes first, then smaller symbols."""
    order, sorted_lengths, tops = _ordered(lengths)
    return torch.zeros(len(lengths), dtype=torch.int64).scatter(0, order, tops >> (LONGEST - sorted_lengths))


def encode(symbols: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Symbols uint8 [n] -> stream uint8 [bytes] and the bytes of each chunk, int16 [ceil(n / CHUNK)].

    lengths: uint8 [256], not 0 for any symbol that occurs.
    """
    firsts = torch.arange(0, len(symbols), CHUNK)
    sizes = torch.empty(len(firsts), dtype=torch.int16)
    if not len(firsts):
        return torch.empty(0, dtype=torch.uint8), sizes
    shared = symbols.contiguous().numpy(), lengths.numpy()
    spread(_measure, len(firsts), shared, (firsts, sizes))
    ends = sizes.long().cumsum(0)
    stream = torch.empty(int(ends[-1]), dtype=torch.uint8)
    codes = canonical_codes(lengths).numpy().astype(np.uint64)
    spread(_write, len(firsts), (*shared, codes, stream.numpy()), (firsts, ends - sizes, ends))
    return stream, sizes


@njit(nogil=True, cache=True)
def _measure(symbols: Any, lengths: Any, firsts: Any, sizes: Any) -> None:
    for c in range(len(firsts)):
        bits = 0
        for i in range(firsts[c], min(firsts[c] + CHUNK, len(symbols))):
            bits += lengths[symbols[i]]
        sizes[c] = (bits + 7) // 8


@njit(nogil=True, cache=True)
def _write(symbols: Any, lengths: Any, codes: Any, stream: Any, firsts: Any, starts: Any, ends: Any) -> None:
    for c in range(len(firsts)):
        held, fill, place = np.uint64(0), np.uint64(0), starts[c]
        for i in range(firsts[c], min(firsts[c] + CHUNK, len(symbols))):
            length = np.uint64(lengths[symbols[i]])
            held = (held << length) | codes[symbols[i]]
            fill += length
            if fill >= np.uint64(32):
                fill -= np.uint64(32)
                word = held >> fill
                for k in range(4):
                    stream[place + k] = np.uint8((word >> np.uint64(24 - 8 * k)) & np.uint64(255))
                place += 4
        held <<= np.uint64(32) - fill
        for k in range(ends[c] - place):
            stream[place + k] = np.uint8((held >> np.uint64(24 - 8 * k)) & np.uint64(255))


def decode(stream: Tensor, sizes: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Inverse of `encode`: stream uint8 [bytes], sizes int16 [chunks], lengths uint8 [256] -> symbols uint8 [count].

    Raises InputError if the parts don't belong together. A changed bit is noticed only if it changes the size of
    its chunk.
    """
    firsts = torch.arange(0, count, CHUNK)
    if len(sizes) != len(firsts):
        raise InputError(f"Huffman stream: {len(sizes)} chunks where {count} symbols have {len(firsts)}; {AGAIN}")
    ends = sizes.long().cumsum(0)
    if int(sizes.sum()) != len(stream) or (sizes < 0).any():
        raise InputError(f"Huffman stream: {len(stream)} bytes where its chunks have {int(sizes.sum())}; {AGAIN}")
    symbols = torch.empty(count, dtype=torch.uint8)
    if not count:
        return symbols
    _check(lengths)
    order, sorted_lengths, tops = (t.numpy() for t in _ordered(lengths))
    shared = order, sorted_lengths, tops, _table(order, sorted_lengths), stream.contiguous().numpy(), symbols.numpy()
    good = torch.empty(len(firsts), dtype=torch.bool)
    spread(_read, len(firsts), shared, (firsts, ends - sizes, ends, good))
    if not good.all():
        raise InputError(f"Huffman stream: {int((~good).sum())} of {len(good)} chunks don't end as stated; {AGAIN}")
    return symbols


def _check(lengths: Tensor) -> None:
    used = lengths[lengths > 0].tolist()
    full = sum(1 << (LONGEST - n) for n in used if n <= LONGEST) == 1 << LONGEST
    if len(lengths) != 256 or max(used, default=0) > LONGEST or not (full or used == [1]):
        raise InputError(f"Huffman stream: the {len(used)} code lengths make no complete code; {AGAIN}")


def _table(order: Any, lengths: Any) -> Any:
    """What the next `_PEEK` bits hold, int64 [2**_PEEK]: up to 4 whole codes.

    Symbols in bits 0..31, their number in 32..39, the bits they take in 40..47; 0 if the first code is longer.
    """
    short = lengths <= _PEEK
    single = np.zeros(1 << _PEEK, dtype=np.int64)
    spans = np.int64(1) << (_PEEK - lengths[short])
    single[: spans.sum()] = np.repeat(order[short] | (lengths[short] << 8), spans)
    windows = np.arange(1 << _PEEK, dtype=np.int64)
    table, taken, fits = np.zeros_like(single), np.zeros_like(single), np.ones(len(single), dtype=bool)
    for k in range(4):
        entry = single[(windows << taken) & (len(single) - 1)]
        fits = fits & (entry > 0) & (taken + (entry >> 8) <= _PEEK)
        taken += np.where(fits, entry >> 8, 0)
        table += np.where(fits, ((entry & 255) << (8 * k)) + (1 << 32), 0)
    return table | (taken << 40)


@njit(nogil=True, cache=True)
def _read(order: Any, lengths: Any, tops: Any, table: Any, stream: Any, symbols: Any,
          firsts: Any, starts: Any, ends: Any, good: Any) -> None:  # fmt: skip
    for c in range(len(firsts)):
        held, fill, place = np.uint64(0), 0, starts[c]
        i, stop = firsts[c], min(firsts[c] + CHUNK, len(symbols))
        while i < stop:
            if fill < 32:
                for k in range(4):
                    byte = stream[place + k] if place + k < ends[c] else np.uint8(0)
                    held |= np.uint64(byte) << np.uint64(56 - 8 * k - fill)
                fill, place = fill + 32, place + 4
            entry = table[held >> np.uint64(64 - _PEEK)]
            if entry and i + 4 <= stop:
                for k in range(4):
                    symbols[i + k] = np.uint8((entry >> (8 * k)) & 255)
                i += (entry >> 32) & 255
                length = entry >> 40
            else:
                top, k = np.int64(held >> np.uint64(32)), 0
                while k + 1 < len(tops) and tops[k + 1] <= top:
                    k += 1
                symbols[i] = order[k]
                i += 1
                length = lengths[k]
            held <<= np.uint64(length)
            fill -= length
        good[c] = (8 * place - fill + 7) // 8 == ends[c]
