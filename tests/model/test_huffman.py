"""Huffman codes are optimal, canonical and undone; damage is told from data."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.model.errors import InputError
from assay.model.huffman import CHUNK, LONGEST, canonical_codes, code_lengths, decode, encode

COUNTS = st.lists(st.integers(0, 3) | st.integers(0, 10**12), min_size=2, max_size=256)
EDGES = st.sampled_from([0, 1, 2, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 2])


def fibonacci(symbols: int) -> Tensor:
    """The histogram with the longest code for its total: symbols - 1 bits."""
    counts = [1, 1]
    while len(counts) < symbols:
        counts.append(counts[-1] + counts[-2])
    return torch.tensor(counts + [0] * (256 - symbols))


def kraft(lengths: Tensor) -> int:
    """Sum of 2**-length in units of 2**-64."""
    return sum(1 << (64 - n) for n in lengths.tolist() if n)


def skewed(count: int, spread: float, seed: int) -> Tensor:
    """Symbols around 128; most of few kinds if `spread` is small."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * spread + 128).clamp(0, 255).to(torch.uint8)


def packed(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lengths = code_lengths(symbols.bincount(minlength=256))
    return *encode(symbols, lengths), lengths


@pytest.mark.parametrize("symbols", [2, 3, 4, 5, 6])
def test_no_prefix_code_is_cheaper(symbols: int) -> None:
    every = torch.tensor(list(product(range(1, symbols), repeat=symbols))) if symbols > 2 else torch.tensor([[1, 1]])
    prefix_codes = every[(2.0**-every).sum(1) <= 1]
    generator = torch.Generator().manual_seed(symbols)
    for scale in (1.0, 3.0, 8.0):
        for _ in range(40):
            counts = 1 + (torch.randn(symbols, generator=generator) * scale).exp().long()
            assert (code_lengths(counts).long() * counts).sum() == (prefix_codes * counts).sum(1).min()


@given(COUNTS)
def test_the_code_is_full_and_within_a_bit_of_the_entropy(numbers: list[int]) -> None:
    counts = torch.tensor(numbers)
    lengths = code_lengths(counts)
    assert torch.equal(lengths > 0, counts > 0)
    if (counts > 0).sum() < 2:
        return
    assert kraft(lengths) == 1 << 64
    shares = counts[counts > 0].double() / counts.sum()
    entropy = float(-(shares * shares.log2()).sum())
    mean = float((shares * lengths[counts > 0]).sum())
    assert entropy - 1e-9 <= mean < entropy + 1


def test_too_long_a_code_counts_the_rarest_as_one() -> None:
    counts = fibonacci(40)
    assert code_lengths(counts, 39).max() == 39
    limited = code_lengths(counts)
    assert limited.max() <= LONGEST
    assert kraft(limited) == 1 << 64
    for levelled in range(2, 40):
        changed = counts.clone()
        changed[:levelled] = 1
        plain = code_lengths(changed, 39)
        if plain.max() <= LONGEST:
            assert torch.equal(limited, plain)
            return
    pytest.fail("no number of levelled symbols was enough")


@given(COUNTS, st.integers(8, 12))
def test_any_limit_that_can_be_kept_is_kept(numbers: list[int], longest: int) -> None:
    lengths = code_lengths(torch.tensor(numbers), longest)
    assert lengths.max() <= longest
    if sum(n > 0 for n in numbers) > 1:
        assert kraft(lengths) == 1 << 64


def test_a_limit_that_can_not_be_kept_is_refused() -> None:
    assert code_lengths(torch.arange(1, 257), 8).tolist() == [8] * 256
    with pytest.raises(ValueError, match="256 symbols"):
        code_lengths(torch.arange(1, 257), 7)


@given(COUNTS)
def test_codes_are_counted_up_by_length_then_symbol(numbers: list[int]) -> None:
    lengths = code_lengths(torch.tensor(numbers))
    codes = canonical_codes(lengths).tolist()
    code, before = -1, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths.tolist()) if n):
        code = (code + 1) << (length - before)
        before = length
        assert codes[symbol] == code


@given(EDGES, st.sampled_from([0.0, 0.4, 2.0, 40.0]), st.integers(0, 99))
def test_the_stream_is_the_codes_in_order(count: int, spread: float, seed: int) -> None:
    symbols = skewed(count, spread, seed)
    stream, sizes, lengths = packed(symbols)
    codes = canonical_codes(lengths).tolist()
    expected = b""
    for n, chunk in enumerate(symbols.split(CHUNK) if count else ()):
        text = "".join(f"{codes[s]:0{lengths[s]}b}" for s in chunk.tolist())
        assert sizes[n] == -(-len(text) // 8)
        expected += int(text.ljust(8 * int(sizes[n]), "0"), 2).to_bytes(int(sizes[n]), "big")
    assert bytes(stream.tolist()) == expected


@given(EDGES | st.integers(0, 3 * CHUNK), st.sampled_from([0.0, 0.4, 2.0, 40.0]), st.integers(0, 99))
def test_decoding_undoes_encoding(count: int, spread: float, seed: int) -> None:
    symbols = skewed(count, spread, seed)
    stream, sizes, lengths = packed(symbols)
    assert torch.equal(decode(stream, sizes, lengths, count), symbols)


@given(EDGES, st.integers(0, 99))
def test_the_longest_codes_come_back(count: int, seed: int) -> None:
    lengths = code_lengths(fibonacci(40))
    symbols = torch.randint(0, 40, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(decode(*encode(symbols, lengths), lengths, count), symbols)


def test_a_chunk_of_the_longest_codes_only() -> None:
    lengths = code_lengths(fibonacci(33))
    assert lengths[0] == LONGEST
    symbols = torch.zeros(CHUNK, dtype=torch.uint8)
    stream, sizes = encode(symbols, lengths)
    assert sizes.tolist() == [CHUNK * LONGEST // 8]
    assert torch.equal(decode(stream, sizes, lengths, CHUNK), symbols)


def test_threads_do_not_change_the_stream() -> None:
    symbols = skewed(20 * CHUNK + 7, 2.0, 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            stream, sizes, lengths = packed(symbols)
            results.append((stream, sizes, decode(stream, sizes, lengths, len(symbols))))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[1][2], symbols)


def test_damage_is_refused_in_one_line() -> None:
    symbols = skewed(3 * CHUNK, 2.0, 0)
    stream, sizes, lengths = packed(symbols)
    moved = sizes + torch.tensor([1, -1, 0], dtype=torch.int16)
    negative = sizes + torch.tensor([-2000, 2000, 0], dtype=torch.int16)
    incomplete, overfull, deep = lengths.clone(), lengths.clone(), lengths.clone()
    incomplete[lengths.argmax()] = 0
    overfull[128] = 1
    deep[lengths.argmax()] = 33
    damaged = {
        "bytes where": [(stream[:-1], sizes, lengths), (stream, negative, lengths)],
        "chunks where": [(stream[: -int(sizes[-1])], sizes[:-1], lengths)],
        "2 of 3 chunks don't end": [(stream, moved, lengths)],
        "no complete code": [(stream, sizes, n) for n in (incomplete, overfull, deep, lengths[:-1], torch.zeros_like(lengths))],
    }
    for message, cases in damaged.items():
        for case in cases:
            with pytest.raises(InputError, match=f"{message}.*download or make it again") as caught:
                decode(*case, len(symbols))
            assert "\n" not in str(caught.value)


def test_a_cut_inside_the_last_chunk_is_noticed_without_its_size() -> None:
    symbols = skewed(CHUNK, 2.0, 0)
    stream, sizes, lengths = packed(symbols)
    with pytest.raises(InputError, match="1 of 1 chunks don't end"):
        decode(stream[:-40], sizes - 40, lengths, CHUNK)
