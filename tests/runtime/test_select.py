"""Budgets and choices against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.runtime.attention import Rule, attend, logits, softmaxed, visible
from assay.runtime.select import allocate, bisect, drop_lowest, pool, prefix_counts, protect, pyramid


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12), st.integers(0, 12))
def test_the_lowest_go_and_of_equals_the_first(values: list[int], excess: int) -> None:
    score = torch.tensor(values, dtype=torch.float32)[None, None]
    excess = min(excess, len(values))
    gone = drop_lowest(score, torch.tensor([[excess]]))[0, 0]
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert set(gone.nonzero()[:, 0].tolist()) == set(order[:excess])


def test_protected_slots_never_go_and_empty_ones_do_not_count() -> None:
    positions = torch.tensor([[[-1, 2, 3, 4, 5, 6]]])
    score = protect(torch.zeros(1, 1, 6), positions, torch.tensor([2]), 1, torch.tensor([5]))
    gone = drop_lowest(score, torch.tensor([[9]]))[0, 0]
    assert gone.tolist() == [False, False, True, True, True, False]


@settings(max_examples=80)
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.integers(0, 80), st.integers(0, 3), st.integers(4, 20))
def test_a_budget_is_spent_exactly_within_bounds(weights: list[float], total: int, low: int, high: int) -> None:
    found = allocate(weights, total, low, high)
    assert sum(found) == min(max(total, low * len(weights)), high * len(weights))
    assert all(low <= x <= high for x in found)
    for (a, x), (b, y) in itertools.combinations(zip(weights, found, strict=True), 2):
        assert (a - b) * (x - y) >= 0 or abs(x - y) <= 1


def test_equal_weights_share_equally() -> None:
    assert allocate([1.0] * 4, 40, 1, 100) == [10] * 4
    assert sum(pyramid(6)) == pytest.approx(6)
    assert pyramid(6)[-1] == pytest.approx(1 / 20)


def retained(curves: list[Tensor], counts: list[int]) -> float:
    return min(float(c.sort(descending=True)[0][:n].sum() / c.sum()) for c, n in zip(curves, counts, strict=True))


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(3, 12))
def test_the_least_retained_mass_is_the_largest_possible(seed: int, total: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    curves = [torch.rand(5, generator=generator).double() ** p for p in (1, 4, 9)]
    found = prefix_counts(curves, total)
    assert sum(found) == total
    best = max(retained(curves, list(c)) for c in itertools.product(range(1, 6), repeat=3) if sum(c) == total)
    assert retained(curves, found) == pytest.approx(best, abs=1e-9)


def test_equal_curves_give_a_uniform_budget() -> None:
    curve = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert prefix_counts([curve] * 4, 80) == [20] * 4
    larger = [sum(prefix_counts([curve, curve**3], n)) for n in range(2, 100)]
    assert larger == sorted(larger)


def test_bisect_stays_on_the_safe_side_of_a_step() -> None:
    assert bisect(lambda x: x < 0.3, 0, 1) == pytest.approx(0.3)
    assert bisect(lambda x: x < 0.3, 0, 1) < 0.3


def test_pooling_ignores_slots_that_hold_nothing() -> None:
    score = torch.tensor([[[9.0, 9.0, 1.0, 4.0, 1.0]]])
    present = torch.tensor([[[False, False, True, True, True]]])
    alone = pool(score[..., 2:], 3, "mean", present[..., 2:])
    torch.testing.assert_close(pool(score, 3, "mean", present)[..., 2:], alone)
    assert pool(score, 3, "max", present)[0, 0, 3] == 4


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_is_the_textbook_one(softcap: float | None, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, h, 20, 8, generator=generator) for h in (6, 2, 2))
    positions = torch.arange(20)[None, None].expand(2, 1, -1).clone()
    positions[1, :, :4] = -1
    asked = positions[:, 0]
    rule = Rule(0.3, window, softcap)
    ours = attend(query, keys, values, visible(positions, asked, window), rule)
    scores = query @ keys.repeat_interleave(3, 1).mT * 0.3
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    for b, start in ((0, 0), (1, 4)):
        for i in range(start, 20):
            first = max(start, 0 if window is None else i - window + 1)
            weights = scores[b, :, i, first : i + 1].softmax(-1)
            wanted = torch.einsum("hs,hsd->hd", weights, values.repeat_interleave(3, 1)[b, :, first : i + 1])
            torch.testing.assert_close(ours[b, :, i], wanted, atol=1e-5, rtol=1e-5)
            alone = softmaxed(logits(query[b : b + 1, :, i : i + 1], keys[b : b + 1], rule), None)
            assert alone.shape == (1, 2, 3, 1, 20)
