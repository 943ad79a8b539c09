"""Levels count bytes exactly, and packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from assay.model.errors import InputError
from assay.model.ggml import KINDS
from assay.model.level import FORMATS, Level
from assay.model.packed import PackedInteger, pack_rows, unpack_rows

LEVELS = st.builds(Level, st.integers(2, 8), st.sampled_from([None, 32, 64, 128]), st.booleans())
ANY = st.sampled_from(sorted(FORMATS)).flatmap(
    lambda name: st.builds(
        Level,
        st.sampled_from(FORMATS[name].bits),
        st.sampled_from(FORMATS[name].group_sizes),
        st.sampled_from(FORMATS[name].symmetric),
        st.just(name),
        *([] if name in KINDS else [st.floats(0, 0.5, exclude_max=True), st.integers(0, 999)]),
    )
)
SCALES = (torch.bfloat16, torch.float16, torch.float32)


def random_packed(level: Level, rows: int, groups: int, dtype: torch.dtype, seed: int) -> PackedInteger:
    generator = torch.Generator().manual_seed(seed)
    columns = groups * (level.group_size or 40)
    groups = level.groups(columns)
    top = 1 << level.bits
    codes = torch.randint(0, top, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).to(dtype)
    zero = torch.randint(0, top, (rows, groups), generator=generator, dtype=torch.uint8)
    return PackedInteger(level, codes, scale, torch.full_like(zero, top // 2) if level.symmetric else zero)


@given(ANY)
@example(Level(4, 64, sparse=0.00005))
def test_a_level_is_its_name(level: Level) -> None:
    assert Level.parse(level.name) == level


@pytest.mark.parametrize(
    "name",
    ["int9-g64-asym", "int4", "int4-g64", "INT4-g64-asym", "int4-g-asym", "", "int4-g64-asym ", "nf4-g64+rank8.5",
     "nf4-g64+sparse1.2.3", "nf4-g64+sparse.", "nf4-g64+sparse5e-05"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown level"):
        Level.parse(name)


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(InputError, match="sizes that fit: 32") as caught:
        Level(4, 128, False).nbytes(8, 96)
    assert "\n" not in str(caught.value)


@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 70), st.integers(0, 999))
def test_packing_rows_is_undone_by_unpacking(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_rows(codes, bits)
    assert words.dtype is torch.int32
    assert words.shape == (rows, -(-count * bits // 32))
    assert torch.equal(unpack_rows(words, bits, count), codes)


@given(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_the_stream_is_little_endian(bits: int, numbers: list[int]) -> None:
    codes = [n % (1 << bits) for n in numbers]
    expected = sum(code << (i * bits) for i, code in enumerate(codes))
    words = pack_rows(torch.tensor([codes], dtype=torch.uint8), bits)[0].tolist()
    assert sum((word % (1 << 32)) << (32 * i) for i, word in enumerate(words)) == expected


@given(LEVELS, st.integers(1, 20), st.integers(1, 3), st.sampled_from(SCALES), st.integers(0, 99))
def test_stored_tensors_have_the_counted_bytes_and_come_back(
    level: Level, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    packed = random_packed(level, rows, groups, dtype, seed)
    stored = packed.tensors()
    counted = level.nbytes(*packed.codes.shape, scale_itemsize=dtype.itemsize)
    assert sum(t.nbytes for t in stored.values()) == packed.nbytes == counted
    again = PackedInteger.from_tensors(stored, level)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.scale, packed.scale)
    assert torch.equal(again.zero_point, packed.zero_point)


@given(LEVELS, st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_decoding_is_scale_times_code_minus_zero(level: Level, rows: int, groups: int, seed: int) -> None:
    packed = random_packed(level, rows, groups, torch.float32, seed)
    size = level.group_size or packed.codes.shape[1]
    decoded = packed.decode()
    for row in range(rows):
        for column in range(0, packed.codes.shape[1], 17):
            offset = int(packed.codes[row, column]) - int(packed.zero_point[row, column // size])
            assert decoded[row, column] == packed.scale[row, column // size] * offset
