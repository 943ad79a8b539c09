"""Sums over tokens."""

import pytest
import torch

from assay.measure import sums


@pytest.mark.parametrize("size", [1, 7, 8, 9, 20])
def test_second_moments_in_strips_are_those_of_all_rows(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "STRIP", 4)
    generator = torch.Generator().manual_seed(size)
    batches = [torch.randn(3, 5, size, generator=generator) for _ in range(2)]
    weights = torch.rand(3, 5, generator=generator)
    found = sums.Sums()
    for rows in batches:
        found.add("x", rows, weights)
        found.add("y", rows)
    rows, each = torch.cat(batches).flatten(0, 1).double(), torch.cat([weights, weights]).flatten().double()
    finished = found.finished()
    torch.testing.assert_close(finished["x"].double(), (rows * each[:, None]).T @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(finished["y"].double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
