"""Splits keep exactly as many weights as asked for, and the right ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.solve.curvature import inverse_factor
from assay.methods.split.scores import columns, deviation, sensitive_or_large, sensitivity, split


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, database=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 42), st.integers(0, 99))
def test_a_split_keeps_the_count_and_the_largest(rows: int, width: int, count: int, seed: int) -> None:
    score = torch.randint(0, 4, (2, rows, width), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    count = min(count, rows * width)
    mask = split(score, count)
    for one, kept in zip(score, mask, strict=True):
        assert int(kept.sum()) == count
        if 0 < count < rows * width:
            assert one[kept].min() >= one[~kept].max()
        order = one.flatten().argsort(descending=True, stable=True)[:count]
        assert torch.equal(kept.flatten().nonzero()[:, 0], order.sort().values)


def test_more_weights_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="7 of 6"):
        split(torch.ones(2, 3), 7)


def test_deviation_counts_standard_deviations() -> None:
    weight = normal(0, 400, 500) * 3 + 7
    assert float((deviation(weight) >= 3).float().mean()) == pytest.approx(0.0027, rel=0.1)
    torch.testing.assert_close(deviation(weight), deviation(weight * 5 - 1), rtol=1e-3, atol=1e-4)


def test_sensitivity_is_the_cost_of_removal_when_later_columns_may_move() -> None:
    x = normal(1, 60, 8) @ normal(2, 8, 8)
    H = (x.mT @ x / 60).double()
    weight = normal(3, 1, 8).double()
    factor, _ = inverse_factor(H, 0.0)
    score = sensitivity(weight, factor.diagonal().double() ** -2)
    for j in range(8):
        later = torch.arange(j + 1, 8)
        push = weight[0, j] * H[j, later]  # minimise (w_j e_j + d)ᵀ H (w_j e_j + d) over d on the later columns
        d = torch.linalg.solve(H[later][:, later], -push) if len(later) else push
        cost = (
            weight[0, j] ** 2 * H[j, j] + 2 * push @ d + d @ H[later][:, later] @ d if len(later) else weight[0, j] ** 2 * H[j, j]
        )
        torch.testing.assert_close(score[0, j], cost, rtol=1e-4, atol=1e-6)


def test_columns_are_kept_whole() -> None:
    importance = torch.tensor([0.3, 2.0, 2.0, 0.1])
    mask = split(columns(importance, 5), 10)
    assert mask.all(0).tolist() == [False, True, True, False] and int(mask.sum()) == 10
    assert split(columns(importance, 5), 7).sum(0).tolist() == [0, 5, 2, 0]


def test_the_two_sets_share_one_count() -> None:
    weight, fisher = normal(4, 3, 20, 30), normal(5, 3, 20, 30).square()
    fisher[:, 0, 0] = 100
    weight[:, 0, 0] = 0  # sensitive, but small
    mask = sensitive_or_large(weight, fisher, 40)
    assert mask.flatten(1).sum(1).tolist() == [40] * 3
    assert mask[:, 0, 0].all()
    for w, f, kept in zip(weight, fisher, mask, strict=True):
        sensitive = split(f, 4)
        assert bool((kept & sensitive).eq(sensitive).all())
        assert w.abs()[kept & ~sensitive].min() >= w.abs()[~kept].max()
