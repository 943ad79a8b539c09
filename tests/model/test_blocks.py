"""ggml's blocks: decoded as the gguf package decodes them, and every byte survives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.model import ggml
from assay.model.blocks import PackedBlocks
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.terms import restore

KINDS = sorted(ggml.KINDS)
QUANTIZED = [k for k in KINDS if k not in ("f16", "bf16")]


def random_rows(kind: str, seed: int, rows: int = 3, blocks: int = 2) -> torch.Tensor:
    """Random bytes whose fp16 scales are finite."""
    facts = ggml.KINDS[kind]
    drawn = np.random.default_rng(seed).integers(0, 256, (rows, blocks, facts.nbytes), dtype=np.uint8)
    for name in ("d", "m"):
        if name in facts.fields and kind != "mxfp4":
            drawn[..., int(facts.fields[name][1].byte[0])] &= 0xBB
    return torch.from_numpy(drawn.reshape(rows, -1))


def packed(kind: str, rows: torch.Tensor) -> PackedBlocks:
    facts = ggml.KINDS[kind]
    return PackedBlocks(kind, rows, (len(rows), rows.shape[1] // facts.nbytes * facts.weights))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_decoding_is_that_of_the_gguf_package(kind: str, seed: int) -> None:
    rows = random_rows(kind, seed)
    expected = quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    found = packed(kind, rows).decode()
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_packing_gives_back_every_byte(kind: str, seed: int) -> None:
    rows = random_rows(kind, seed)
    if kind == "tq1_0":  # 243 of a byte's 256 values stand for digits
        rows = ggml.pack(kind, ggml.unpack(kind, rows))
    if kind == "tq2_0":  # of a pair's 4 values 3 are used, all 4 are stored
        assert int(ggml.unpack(kind, rows).codes.max()) == 3
    assert torch.equal(ggml.pack(kind, ggml.unpack(kind, rows)), rows)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_fields_of_a_block_share_no_bit(kind: str) -> None:
    facts, seen = ggml.KINDS[kind], set()
    for segments in facts.fields.values():
        for byte, shift, bits in segments:
            places = {(int(b), int(s) + k) for b, s in zip(byte, shift, strict=True) for k in range(bits)}
            assert len(places) == len(byte) * bits and not places & seen
            seen |= places
    stored = 8 * (facts.nbytes - (52 if kind == "tq1_0" else 0))
    assert len(seen) == stored and max(s for _, s in seen) < 8


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_ggml(kind: str) -> None:
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    level = Level.parse(kind)
    assert (ggml.KINDS[kind].weights, ggml.KINDS[kind].nbytes) == (weights, nbytes)
    assert level.name == kind and level.bits == 8 * nbytes / weights
    made = packed(kind, random_rows(kind, 0))
    assert made.nbytes == level.nbytes(*made.shape) == sum(t.nbytes for t in made.tensors().values())


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tensors_restore_the_weight(kind: str) -> None:
    made = packed(kind, random_rows(kind, 1))
    back = restore(made.tensors(), made.level, torch.bfloat16)
    assert isinstance(back, PackedBlocks) and back.shape == made.shape and torch.equal(back.rows, made.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_tunable_scales_and_minima_make_the_same_weight(kind: str) -> None:
    made = packed(kind, random_rows(kind, 2) if kind != "tq1_0" else ggml.pack(kind, ggml.unpack(kind, random_rows(kind, 2))))
    found = made.tunable()
    if found is None:
        assert kind in ("f16", "bf16", "mxfp4")
        return
    numbers, _, weight, dtype = found
    assert dtype is torch.float16
    assert numbers.shape[-1] == (1 if made.parts().m is None else 2)
    torch.testing.assert_close(weight(numbers), made.decode(), rtol=1e-6, atol=1e-6 * float(made.decode().abs().max()))
    assert torch.equal(made.with_numbers(numbers).rows, made.rows)
    for i in range(numbers.shape[-1]):
        halved = numbers.clone()
        halved[..., i] /= 2
        stored = made.with_numbers(halved).decode()
        torch.testing.assert_close(stored, weight(halved), rtol=1e-3, atol=1e-3 * float(stored.abs().max()))
        assert not torch.equal(stored, made.decode())


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="q4_k cuts rows into blocks of 256 weights, which do not divide 320"):
        Level.parse("q4_k").nbytes(8, 320)
    with pytest.raises(InputError, match="is uint8"):
        PackedBlocks("q4_0", torch.zeros(4, 18, dtype=torch.uint8), (4, 64))
    with pytest.raises(InputError, match="no terms beside"):
        Level(4.5, 256, True, "q4_k", sparse=0.01)
