"""Prices: what each site costs at each level under each solver, from statistics alone, nothing solved.

Rounding errors of a fitted grid are nearly white, so their damage is the sum over weights of
g_i h_j d_ij² / 2, with the diagonals of G and H for rounding to nearest, and with the pivots of their
factorisations where errors are fed back (QuIP: 2-Bit Quantization of LLMs With Guarantees, 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from assay.measure.damage import Curvature, diagonal, pivots
from assay.methods.grid.integer import IntegerGrid
from assay.model.level import Level

BITS = (2, 3, 4, 5, 6, 8)
SYMMETRIC_BITS = (4, 8)
GROUPS: tuple[int | None, ...] = (32, 64, 128, None)
MEASURED_BITS = 4
"""Above this width the error falls as the square of the step, so one rounding serves all of them."""

SAMPLED_ROWS = 256
"""Rows of a matrix that are rounded to price it."""


def menu(columns: int) -> list[Level]:
    """Every level priced for rows of `columns` weights."""
    sizes = [g for g in GROUPS if g is None or (columns % g == 0 and g < columns)]
    return [Level(b, g, s) for b in BITS for g in sizes for s in (False, True) if not s or b in SYMMETRIC_BITS]


def price(weight: Tensor, curvature: Curvature, levels: Iterable[Level]) -> dict[str, dict[str, float]]:
    """Damage in nats per token by level name and price ("nearest", "gptq", "two_sided").

    weight: float32 [out, in].
    """
    columns, pivot_columns = diagonal(curvature.h), pivots(curvature.h)
    weight, (rows, pivot_rows) = _sample(weight, columns, diagonal(curvature.g), pivots(curvature.g))
    errors: dict[Level, dict[str, float]] = {}
    found = {}
    for level in levels:
        base = Level(min(level.bits, MEASURED_BITS), level.group_size, level.symmetric)
        if base not in errors:
            plain, clipped = _squared_errors(weight, base, columns)
            errors[base] = {
                "nearest": 0.5 * curvature.share * float(rows @ plain @ columns),
                "gptq": 0.5 * curvature.share * float(rows @ clipped @ pivot_columns),
                "two_sided": 0.5 * curvature.share * float(pivot_rows @ clipped @ pivot_columns),
            }
        finer = ((2**base.bits - 1) / (2**level.bits - 1)) ** 2
        found[level.name] = {k: v * finer for k, v in errors[base].items()}
    return found


def _sample(weight: Tensor, columns: Tensor, *prices: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Evenly spaced rows of a weight, and the prices of these rows raised to stand for all.

    A row's rounding error is nearly proportional to its energy, so that is what the raise keeps.
    """
    if len(weight) <= SAMPLED_ROWS:
        return weight, list(prices)
    picked = torch.linspace(0, len(weight) - 1, SAMPLED_ROWS).round().long()
    energy = weight.square() @ columns
    raised = [p[picked] * ((p @ energy) / (p[picked] @ energy[picked]).clamp_min(1e-30)) for p in prices]
    return weight[picked], raised


def _squared_errors(weight: Tensor, level: Level, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Squared rounding errors [out, in] on the grid of the full range, and on the one that clips best."""
    grid = IntegerGrid(level.bits, level.group_size, level.symmetric, torch.float32)
    affines = (grid.fit(weight), grid.fit_clipped(weight, importance))
    plain, clipped = (grid.squared_errors(weight, affine) for affine in affines)
    return plain, clipped
