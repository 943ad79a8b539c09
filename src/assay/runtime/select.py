"""Which slots stay: scores with protected slots, budgets over layers and heads, and searches on step functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def protect(score: Tensor, positions: Tensor, first: Tensor, sinks: int, after: Tensor | int, holes: bool = True) -> Tensor:
    """Scores [B, H, S] with infinity for the first `sinks` tokens and those after position `after`, its negative for none.

    positions int [B, H or 1, S], negative where a slot is empty, which only those with `holes` have; first: int [B]; after:
    int [B], or the same for all.
    """
    kept = positions > (after if isinstance(after, int) else after[:, None, None])
    if sinks:
        kept |= positions < (first + sinks)[:, None, None]
    score = score.masked_fill(kept, torch.inf)
    return score.masked_fill_(positions < 0, -torch.inf) if holes else score


def drop_lowest(score: Tensor, excess: Tensor) -> Tensor:
    """Which slots go: the `excess` [B, H] lowest of score [B, H, S], of equals the first; never those at infinity."""
    if int(excess.max()) <= 1:
        lowest = score.masked_fill(score == -torch.inf, torch.inf).argmin(-1, keepdim=True)
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, lowest, (excess > 0)[..., None]) & score.isfinite()
    order = score.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order))
    empty = (score == -torch.inf).sum(-1)
    return (rank >= empty[..., None]) & (rank < (empty + excess.clamp_min(0))[..., None]) & score.isfinite()


def pool(score: Tensor, kernel: int, how: str, present: Tensor) -> Tensor:
    """Scores [B, H, S], not negative, smoothed over neighbouring slots that are present, bool [B, H or 1, S]."""
    if kernel == 1:
        return score
    there = present.expand_as(score).to(score.dtype)
    if how == "max":
        return functional.max_pool1d(score * there, kernel, 1, kernel // 2)
    sums, counts = (functional.avg_pool1d(x, kernel, 1, kernel // 2) for x in (score * there, there))
    return sums / counts.clamp_min(0.5 / kernel)


def bisect(holds: Callable[[float], bool], low: float, high: float, steps: int = 50) -> float:
    """The largest value found in [low, high] for which `holds`; low must hold, and what holds must be below what doesn't."""
    if holds(high):
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def allocate(weights: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """`total` split in whole numbers in proportion to weights, each between low and high (as far as the total allows).

    What a bound takes or gives is shared among the rest in proportion; rounding follows the largest remainders.
    """
    count = len(weights)
    total = min(max(total, low * count), high * count)

    def spread(scale: float) -> list[float]:
        return [min(max(scale * w, low), high) for w in weights]

    top = high * count / max(min((w for w in weights if w > 0), default=1.0), 1e-12)
    exact = spread(bisect(lambda s: sum(spread(s)) <= total, 0.0, top, 200))
    found = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(count), key=lambda i: (found[i] - exact[i], i))
    while sum(found) < total:
        for i in order:
            if sum(found) < total and found[i] < high:
                found[i] += 1
    return found


def pyramid(layers: int, ratio: float = 20.0) -> list[float]:
    """Weights of layers that fall linearly, mean 1; the last gets 1/ratio of the mean (PyramidKV, 2024)."""
    last = 1 / ratio
    return [2 - last - (2 - 2 * last) * i / max(layers - 1, 1) for i in range(layers)]


def prefix_counts(curves: Sequence[Tensor], total: int) -> list[int]:
    """Slots for each layer so that all retain the same share of their mass (PrefixKV, 2024).

    curves: for each layer its scores, any order, not negative; total: slots of all layers. The smallest retained share
    over layers is the largest possible; slots left over go to the layers that retain least.
    """
    masses = []
    for scores in curves:
        ordered = scores.double().sort(descending=True)[0]
        masses.append(ordered.cumsum(0) / ordered.sum().clamp_min(1e-300))

    def counts(share: float) -> list[int]:
        return [min(int(torch.searchsorted(mass, share - 1e-12)) + 1, len(mass)) for mass in masses]

    if sum(counts(0.0)) > total:
        return allocate([1.0] * len(masses), total, 0, max(map(len, masses)))
    found = counts(bisect(lambda share: sum(counts(share)) <= total, 0.0, 1.0))
    while sum(found) < total and any(n < len(m) for n, m in zip(found, masses, strict=True)):
        open_ = [i for i, m in enumerate(masses) if found[i] < len(m)]
        found[min(open_, key=lambda i: float(masses[i][found[i] - 1]))] += 1
    return found
