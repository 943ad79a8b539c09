"""Sums over tokens."""

import pytest
import torch

from assay.measure import sums, triangle
from assay.measure.damage import Curvature


@pytest.mark.parametrize("size", [1, 7, 8, 9, 20])
def test_second_moments_in_strips_are_those_of_all_rows(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "STRIP", 4)
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


@pytest.mark.parametrize("outputs", ["diagonal", "whole"])
@pytest.mark.parametrize("size", [3, 8, 10])
def test_damage_in_strips_is_that_of_whole_products(size: int, outputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "STRIP", 4)
    generator = torch.Generator().manual_seed(size)
    change, x, y = (torch.randn(n, m, generator=generator) for n, m in ((5, size), (30, size), (30, 5)))
    h, g = x.T @ x, y.T @ y
    g = g if outputs == "whole" else g.diagonal().diag()
    found = Curvature(h, g if outputs == "whole" else g.diagonal(), share=0.5, tokens=30).damage(change)
    assert found == pytest.approx(0.25 * float((g @ change @ h @ change.T).trace()), rel=1e-5)
