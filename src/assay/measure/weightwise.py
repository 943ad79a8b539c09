"""Statistics with a number for every weight: gradients of the loss, and their squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from assay.model.sites import Site


class WeightSums:
    """Sums over a sample of dL/dW or of its square, float32 [out, in] by site."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def fresh(self) -> WeightSums:
        """As it was before anything was added."""
        return WeightSums()

    def merge(self, other: WeightSums) -> None:
        """Add the sums over other windows."""
        for name, value in other.values.items():
            self._add(name, value)

    def _add(self, name: str, value: Tensor) -> None:
        known = self.values.get(name)
        self.values[name] = value if known is None else known.add_(value)

    def gradient(self, sites: list[Site], x: Tensor, y: Tensor) -> None:
        """A product y = x Wᵀ: its weight's gradient is added when y's arrives."""
        self._listen(sites, x, y, lambda g, x: g.flatten(0, -2).T @ x.flatten(0, -2))

    def fisher(self, sites: list[Site], x: Tensor, y: Tensor) -> None:
        """The same, squared window by window: the diagonal of the Fisher matrix if labels come from the model.

        Where windows are mixed (experts, flattened products) a batch counts as one sample. Labels of different
        windows are independent and gradients average to zero, so that sum has the same expectation, only more noise.
        """
        self._listen(sites, x, y, _squares)

    def untouched(self, sites: list[Site]) -> None:
        """Sites that no gradient reached get zeros."""
        for site in sites:
            self.values.setdefault(site.name, torch.zeros(site.shape))

    def averages(self, count: int) -> dict[str, Tensor]:
        """The sums divided by `count`."""
        return {name: total / count for name, total in self.values.items()}

    def _listen(self, sites: list[Site], x: Tensor, y: Tensor, outcome: Callable[[Tensor, Tensor], Tensor]) -> None:
        inputs = x.detach()

        def arrived(gradient: Tensor) -> None:
            for site in sites:
                rows = slice(*site.rows) if site.rows else slice(None)
                self._add(site.name, outcome(gradient[..., rows], inputs))

        if y.requires_grad:
            y.register_hook(arrived)


def _squares(gradient: Tensor, x: Tensor) -> Tensor:
    """Sum over windows of (dL/dW)²: gradient [windows, tokens, out] or [tokens, out], x alike -> [out, in]."""
    windows = [(gradient, x)] if x.ndim == 2 else list(zip(gradient, x, strict=True))
    total = torch.zeros(gradient.shape[-1], x.shape[-1])
    for g, inputs in windows:
        total += (g.T @ inputs).square()
    return total
