"""Packed bf16 comes back bit for bit, in the bytes it counts, close to the entropy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.model.dfloat11 import PackedBfloat16
from assay.model.errors import InputError
from assay.model.huffman import CHUNK

SHAPES = st.lists(st.integers(0, 40), max_size=3)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def entropy_bits(tensor: Tensor) -> float:
    """Bits of all signs, mantissas and exponents, these at their entropy."""
    shares = ((bits(tensor).flatten().long() >> 7) & 0xFF).bincount().double() / tensor.numel()
    shares = shares[shares > 0]
    return tensor.numel() * (8 - float((shares * shares.log2()).sum()))


def check(tensor: Tensor) -> PackedBfloat16:
    packed = PackedBfloat16.encode(tensor)
    stored = packed.tensors()
    for decoded in (packed.decode(), PackedBfloat16.from_tensors(stored).decode()):
        assert decoded.dtype is torch.bfloat16
        assert decoded.shape == tensor.shape
        assert torch.equal(bits(decoded), bits(tensor))
    chunks = -(-tensor.numel() // CHUNK)
    counted = len(packed.exponents) + 2 * chunks + 256 + tensor.numel() + 8 * tensor.dim()
    assert packed.nbytes == counted == sum(t.untyped_storage().nbytes() for t in stored.values())
    return packed


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_value_comes_back(shuffled: bool) -> None:
    """Zeros of both signs, subnormals, infinities and every NaN included."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(1 << 16)
    packed = check((order - (1 << 15)).to(torch.int16).view(torch.bfloat16).view(256, 256))
    assert packed.code_lengths.tolist() == [8] * 256


@given(SHAPES, st.sampled_from([0, 7, 9, 12]), st.integers(0, 999))
def test_any_bits_of_any_shape_come_back(shape: list[int], shift: int, seed: int) -> None:
    """`shift` leaves the codes of few exponents, or of all."""
    values = torch.randint(-(1 << 15), 1 << 15, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    check((values >> shift).view(torch.bfloat16))


@given(st.floats(width=16, allow_nan=True), st.integers(1, 3 * CHUNK))
def test_one_exponent_takes_one_bit(value: float, count: int) -> None:
    packed = check(torch.full((count,), value, dtype=torch.bfloat16))
    assert packed.code_lengths.sum() == 1
    assert len(packed.exponents) == sum(-(-min(CHUNK, count - first) // 8) for first in range(0, count, CHUNK))


def test_views_and_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16())
    for tensor in (weight, weight.T, weight[::3, 5:], weight[0, 0]):
        assert torch.equal(PackedBfloat16.encode(tensor).decode(), tensor.detach())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        PackedBfloat16.encode(torch.zeros(3, dtype=torch.float16))


def test_a_gaussian_takes_the_bits_of_its_entropy() -> None:
    weight = (torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    packed = check(weight)
    entropy = entropy_bits(weight) / weight.numel() - 8
    exponents = ((bits(weight).flatten().long() >> 7) & 0xFF).bincount(minlength=256)
    mean = float((exponents * packed.code_lengths).sum()) / weight.numel()
    assert entropy == pytest.approx(2.55, abs=0.01)
    assert mean == pytest.approx(2.59, abs=0.01)
    total = 8 * packed.nbytes / weight.numel()
    published_layout = 8 + mean * (1 + 5 / 64 + 32 / 32768)
    assert published_layout == pytest.approx(10.8, abs=0.01)
    assert total < published_layout
    assert total <= 1.02 * (8 + entropy)
    assert total - 8 - mean < 0.02


def test_a_trained_model_takes_the_bits_of_its_entropy() -> None:
    folders = [parent / "shared/models/pebble" for parent in Path(__file__).resolve().parents]
    folder = next((f for f in folders if (f / "model.safetensors").exists()), None)
    if folder is None:
        pytest.skip("shared/models/pebble is not here")
    weights = load_file(folder / "model.safetensors")
    packed = {name: check(weight) for name, weight in weights.items()}
    entropy = sum(entropy_bits(weight) for weight in weights.values()) / 8
    size = sum(p.nbytes for p in packed.values())
    assert entropy < size <= 1.02 * entropy
    assert size < 0.7 * sum(w.nbytes for w in weights.values())


def test_a_file_of_it_comes_back(tmp_path: Path) -> None:
    weight = torch.randn(100, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    for tensor in (weight, weight[:0], weight[0, 0]):
        save_file(PackedBfloat16.encode(tensor).tensors(), tmp_path / "packed.safetensors")
        again = PackedBfloat16.from_tensors(load_file(tmp_path / "packed.safetensors"))
        assert torch.equal(again.decode(), tensor)


def test_parts_cut_short_are_refused_in_one_line() -> None:
    weight = torch.randn(100, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = PackedBfloat16.encode(weight).tensors()
    for name, part in stored.items():
        with pytest.raises(InputError, match="file is damaged: download or make it again") as caught:
            PackedBfloat16.from_tensors({**stored, name: part[:-1]}).decode()
        assert "\n" not in str(caught.value)


def test_parts_that_are_missing_or_of_another_kind_are_refused() -> None:
    stored = PackedBfloat16.encode(torch.ones(4, 4, dtype=torch.bfloat16)).tensors()
    for name, part in stored.items():
        others = {key: value for key, value in stored.items() if key != name}
        for wrong in (others, {**others, name: part.float()}, {**others, name: part[None]}):
            with pytest.raises(InputError, match=f"no '{name}'"):
                PackedBfloat16.from_tensors(wrong)
    with pytest.raises(InputError, match=r"16 signs for shape \[-4, -4\]"):
        PackedBfloat16.from_tensors({**stored, "shape": torch.tensor([-4, -4])}).decode()
