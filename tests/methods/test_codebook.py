"""Scalar codebooks are optimal: against every partition, and against Lloyd's iterations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.methods.solve import codebook


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(seed: int, *shape: int) -> Tensor:
    """Importance with a heavy tail, a tenth of it zero."""
    drawn = values(seed, *shape)
    return (3 * drawn).exp() * (drawn > -1.28)


def cost(x: Tensor, price: Tensor, table: Tensor) -> Tensor:
    return (price * (x - table.gather(-1, codebook.nearest(x, table).long())).square()).sum(-1)


def centres(member: Tensor, x: Tensor, price: Tensor) -> Tensor:
    """Weighted means: member [..., n, size], x and price [n] -> [..., size]."""
    held = member.mT @ price
    return (member.mT @ (price * x)) / held.clamp_min(1e-30)


@pytest.mark.parametrize(("size", "count"), [(2, 12), (3, 8), (4, 7)])
def test_no_partition_is_better(size: int, count: int) -> None:
    labels = torch.cartesian_prod(*[torch.arange(size)] * count)
    member = torch.nn.functional.one_hot(labels, size).double()
    for seed in range(20):
        x, price = values(seed, count).double(), heavy(seed + 100, count).double()
        decoded = (member @ centres(member, x, price)[..., None])[..., 0]
        best = (price * (x - decoded).square()).sum(-1).min()
        found = cost(x, price, codebook.fit(x.float(), price.float(), size).double())
        assert float(found) == pytest.approx(float(best), rel=1e-4, abs=1e-9)


def test_centres_are_means_and_weights_sit_at_the_nearest() -> None:
    x, price = values(0, 6, 200), heavy(1, 6, 200)
    table = codebook.fit(x, price, 8)
    assert bool((table.diff() > 0).all())
    codes = codebook.nearest(x, table).long()
    assert torch.equal(codes, (x[..., None] - table[..., None, :]).abs().argmin(-1))
    for row in range(6):
        member = torch.nn.functional.one_hot(codes[row], 8).float()
        torch.testing.assert_close(table[row], centres(member, x[row], price[row]), rtol=1e-4, atol=1e-5)


def test_lloyds_iterations_end_no_better_and_often_worse() -> None:
    x, price = values(2, 40, 300), heavy(3, 40, 300)
    exact = cost(x, price, codebook.fit(x, price, 8))
    start = torch.stack([row.quantile(torch.linspace(0.05, 0.95, 8)) for row in x])
    found = []
    for row in range(40):
        table = start[row]
        for _ in range(200):
            member = torch.nn.functional.one_hot(codebook.nearest(x[row], table).long(), 8).float()
            table = torch.where(member.T @ price[row] > 0, centres(member, x[row], price[row]), table).sort().values
        found.append(cost(x[row], price[row], table))
    ratio = torch.stack(found) / exact
    assert float(ratio.min()) > 1 - 1e-4
    assert float(ratio.median()) > 1.02


def test_equal_importance_is_ordinary_k_means_and_so_is_none() -> None:
    x = values(4, 5, 100)
    alike = codebook.fit(x, torch.full_like(x, 3.0), 8)
    torch.testing.assert_close(alike, codebook.fit(x, torch.ones_like(x), 8))
    assert torch.equal(codebook.fit(x, torch.zeros_like(x), 8), codebook.fit(x, torch.ones_like(x), 8))


@settings(max_examples=60, database=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30), st.integers(1, 16), st.integers(0, 9))
def test_few_distinct_values_are_all_kept(numbers: list[int], size: int, seed: int) -> None:
    x, price = torch.tensor(numbers).float(), values(seed, len(numbers)).abs() + 0.1
    table = codebook.fit(x, price, size)
    assert bool((table.diff() >= 0).all())
    if len(set(numbers)) <= size:
        assert float(cost(x, price, table)) == 0


def test_vanishing_importance_leaves_the_table_finite() -> None:
    x, price = values(5, 3, 500), torch.rand(3, 500, generator=torch.Generator().manual_seed(6)) ** 30
    assert bool(torch.isfinite(codebook.fit(x, price, 16)).all())
    assert bool((codebook.fit(x, price, 16).diff() >= 0).all())
