"""Random menus, and what is known about them by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hypothesis import strategies as st

from assay.budget.menu import Decision, Option

LEVELS = [f"int{bits}-g{group}-asym" for bits in (2, 3, 4, 5, 6, 8) for group in (128, 64, 32)]


def decision(index: int, sizes: Sequence[int], damages: Sequence[float], levels: Sequence[str], inside: bool) -> Decision:
    """A decision whose last size is the stored one; damages fall as sizes rise."""
    names: list[str | None] = [*levels, None]
    damages = [*sorted(damages, reverse=True), 0.0]
    options = tuple(Option(n, b, d) for n, b, d in zip(names, sorted(sizes), damages, strict=True))
    return Decision(f"s{index}", (f"s{index}",), 1000, inside, options)


@st.composite
def menus(draw: st.DrawFn, most: int = 5, options: int = 4, biggest: int = 10**6) -> list[Decision]:
    """One to `most` decisions; damages span ten decades, so that tolerances of a solver show."""
    found = []
    for index in range(draw(st.integers(1, most))):
        count = draw(st.integers(1, options))
        sizes = draw(st.lists(st.integers(1, biggest), min_size=count, max_size=count, unique=True))
        powers = draw(st.lists(st.floats(-9, 1), min_size=count - 1, max_size=count - 1, unique_by=lambda x: 10.0**x))
        levels = draw(st.lists(st.sampled_from(LEVELS), min_size=count - 1, max_size=count - 1, unique=True))
        found.append(decision(index, sizes, [10.0**p for p in powers], levels, draw(st.booleans())))
    return found


@st.composite
def cases(draw: st.DrawFn, most: int = 5, options: int = 4, biggest: int = 10**6) -> tuple[list[Decision], int]:
    """A menu and a budget that its smallest options fit."""
    found = draw(menus(most, options, biggest))
    low, high = extremes(found)
    return found, draw(st.integers(low, high + 10))


def extremes(decisions: Sequence[Decision]) -> tuple[int, int]:
    """Bytes of the smallest and of the largest choice."""
    return sum(d.options[0].nbytes for d in decisions), sum(d.options[-1].nbytes for d in decisions)


def nbytes(decisions: Sequence[Decision], choice: Sequence[int]) -> int:
    """Total bytes; every index must be there."""
    assert all(0 <= c < len(d.options) for d, c in zip(decisions, choice, strict=True))
    return sum(d.options[c].nbytes for d, c in zip(decisions, choice, strict=True))


def damage(decisions: Sequence[Decision], choice: Sequence[int]) -> float:
    """Total damage, nats per token."""
    return math.fsum(d.options[c].damage for d, c in zip(decisions, choice, strict=True))


def every(decisions: Sequence[Decision]) -> list[tuple[int, ...]]:
    """Every choice there is."""
    return list(itertools.product(*(range(len(d.options)) for d in decisions)))


def least_damage(decisions: Sequence[Decision], budget: int) -> float:
    """By brute force."""
    return min(damage(decisions, c) for c in every(decisions) if nbytes(decisions, c) <= budget)


def least_bytes(decisions: Sequence[Decision], bound: float) -> int:
    """By brute force."""
    return min(nbytes(decisions, c) for c in every(decisions) if damage(decisions, c) <= bound)


def largest_step(decisions: Sequence[Decision]) -> tuple[int, float]:
    """More than the bytes, and than the damage, between two options of one decision."""
    return (
        max(d.options[-1].nbytes - d.options[0].nbytes for d in decisions),
        max(d.options[0].damage - d.options[-1].damage for d in decisions),
    )
