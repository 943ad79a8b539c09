"""The E8 codebook: points of the lattice, each of them reachable, the nearest of them found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import damage, pebble_block
from torch import Tensor

from assay.budget.prices import price
from assay.methods.base import Statistics, get
from assay.methods.grid import lattice
from assay.methods.grid.lloyd_max import gaussian_distortion, lloyd_max
from assay.methods.grid.trellis import encode as trellis_encode
from assay.model import lattice as book
from assay.model.level import Level
from assay.model.terms import restore
from assay.model.trellis import Trellis

E8P = 0.089
"""As we remember it from the table of 2-bit distortions in QTIP (2024); see the docstring of `lattice`."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian(rows: int, length: int) -> Tensor:
    count = rows * length
    quantiles = torch.special.ndtri((torch.arange(count).double() + 0.5) / count).float()
    return quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(0))].view(rows, length)


def test_every_entry_survives() -> None:
    table = book.codebook()
    assert table.shape == (65536, 8)
    codes, values = lattice.encode(table.view(256, -1))
    assert codes.dtype == torch.int16
    assert codes.element_size() * 8 * codes.numel() == 2 * table.numel(), "two bits a weight"
    assert torch.equal(codes.flatten().int() & 0xFFFF, torch.arange(65536, dtype=torch.int32))
    assert torch.equal(values, table.view(256, -1))


def test_before_stretching_entries_are_the_moved_lattice() -> None:
    """E8 + 1/4: differences of entries are all integers or all half-odd, with an even sum."""
    code = torch.arange(1 << 16)
    stretched = book.codebook() / book.SCALE
    shift = 0.25 * (1 - 2 * (code[:, None] & 1))
    plain = (stretched - shift).sign() * book.half_odd()[code >> 8] + shift
    difference = (plain - plain[0]).double()
    twice = 2 * difference
    assert torch.equal(twice, twice.round())
    odd = twice.remainder(2)
    assert torch.equal(odd, odd[:, :1].expand_as(odd))
    assert (difference.sum(1).remainder(2) == 0).all()
    assert len(torch.unique(plain, dim=0)) == 65536
    assert (plain - shift).square().sum(1).max() == 12
    assert ((plain - shift).square().sum(1) <= 10).sum() == 227 * 256


@pytest.mark.parametrize("weighted", [False, True])
def test_the_nearest_of_all_is_found(weighted: bool) -> None:
    x = normal(1, 200, 8) * torch.linspace(0.2, 3, 200)[:, None]
    weight = normal(2, 200, 8).square() if weighted else torch.ones(200, 8)
    values = lattice.encode(x, weight if weighted else None).values
    table = book.codebook().double()
    for target, cost, found in zip(x.double(), weight.double(), values.double(), strict=True):
        nearest = (cost * (target - table).square()).sum(1).min()
        torch.testing.assert_close((cost * (target - found).square()).sum(), nearest, rtol=1e-5, atol=1e-6)


def test_distortion_is_as_published_and_between_scalar_and_trellis() -> None:
    x = gaussian(64, 4096)
    found = float((lattice.encode(x).values - x).square().mean())
    assert found == pytest.approx(E8P, rel=0.02)
    trellis = float((trellis_encode(Trellis((2,)), x[:8]).values - x[:8]).square().mean())
    assert 2**-4 < trellis < found < 0.8 * gaussian_distortion(lloyd_max(2))


def test_rows_are_read_as_they_were_written() -> None:
    x = normal(3, 5, 40)
    codes, values = lattice.encode(x)
    assert codes.shape == (5, 5)
    assert torch.equal(book.decode(codes), values)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(lattice.encode(x).codes, codes)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    for x, weight in ((torch.zeros(2, 9), None), (torch.zeros(8), None), (torch.zeros(1, 8), torch.ones(8)),
                      (torch.full((1, 8), torch.inf), None), (torch.zeros(1, 8), -torch.ones(1, 8))):  # fmt: skip
        with pytest.raises(ValueError, match="lattice"):
            lattice.encode(x, weight)


# ---- as a method -------------------------------------------------------------------------------


@settings(max_examples=20, database=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_any_shape_comes_back_and_is_counted(rows: int, columns: int, seed: int) -> None:
    level = Level.parse("lattice2-channel")
    weight = normal(seed, 1, rows, columns)
    weight[:, 0] = 0
    packed = get("quip_sharp")().encode(weight, level, torch.bfloat16, Statistics())[0]
    stored = packed.tensors()
    assert torch.equal(restore(stored, level, torch.bfloat16).decode(), packed.decode())
    assert packed.decode().shape == (rows, columns)
    assert packed.nbytes == sum(t.nbytes for t in stored.values()) == level.nbytes(rows, columns)


def test_without_statistics_it_leaves_the_distortion_of_a_gaussian() -> None:
    weight = normal(5, 1, 64, 512)
    packed = get("quip_sharp")().encode(weight, Level.parse("lattice2-channel"), torch.float32, Statistics())[0]
    assert float((packed.decode() - weight[0]).square().mean()) == pytest.approx(E8P, rel=0.05)


def test_on_real_weights_it_beats_even_steps_and_its_price_is_right() -> None:
    level = Level.parse("lattice2-channel")
    found = damage("quip_sharp", level.name)
    told = sum(price(w, c, [level])[level.name]["gptq"] for w, c in pebble_block().values())
    assert found < 0.6 * damage("gptq", "int2-g64-asym")
    assert told == pytest.approx(found, rel=0.25)
