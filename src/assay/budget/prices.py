"""Prices: what each site costs at each level under each solver, from statistics alone, nothing solved.

Rounding errors of a fitted grid are nearly white, so their damage is the sum over weights of
g_i h_j d_ij² / 2, with the diagonals of G and H for rounding to nearest, and with the pivots of their
factorisations where errors are fed back (QuIP: 2-Bit Quantization of LLMs With Guarantees, 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from assay.measure.damage import Curvature, diagonal
from assay.methods import base
from assay.methods.grid import blocks
from assay.methods.grid.formats import grid_of
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.trellis import distortion
from assay.methods.solve.curvature import (
    DAMPING,
    INPUT_SHRINKAGE,
    OUTPUT_SHRINKAGE,
    falling_order,
    feedback_cost,
    inverse_factor,
    permute,
    shrink,
)  # fmt: skip
from assay.methods.solve.trellis import feedback_gain, swelling
from assay.model.ggml import KINDS
from assay.model.lattice import DISTORTION as LATTICE
from assay.model.level import Level
from assay.model.rotation import rotate_both
from assay.model.threads import Begin, now

MEASURED_BITS = 4
"""Above this width the error falls as the square of the step, so one rounding serves all of them."""

OWN = {"power": "nupes", "lut": "squeezellm", "salient": "pb_llm", "planes": "bit_planes", "vector": "vptq"}
"""Formats that aren't a grid for single weights, and the method that makes them."""

SAMPLED_ROWS = 256
"""Rows of a matrix that are rounded to price it."""


@dataclass(frozen=True)
class InputCosts:
    """What a squared error costs at each input, for all matrices that read it, [in].

    plain: rounded to nearest; fed: under feedback; rotated: both summed over the inputs of the rotated matrix, and
    the gain of its feedback.
    """

    plain: Tensor
    fed: Tensor
    rotated: tuple[float, float, Tensor] | None = None

    @classmethod
    def of(cls, moment: Tensor, rotated: bool) -> InputCosts:
        """From H [in, in] or its diagonal [in]. rotated: whether levels that rotate are to be priced."""
        plain, fed = diagonal(moment), _inputs(moment)
        if not rotated or moment.ndim == 1:
            return cls(plain, fed)
        turned = rotate_both(moment)
        return cls(
            plain, fed, (float(diagonal(turned).sum()), float(_inputs(turned).sum()), _gain(turned, INPUT_SHRINKAGE, True))
        )


def rotates(level: Level) -> bool:
    """Whether a level's grid is for rotated weights."""
    return level.format in ("trellis", "lattice")


Prices = dict[str, dict[str, float]]


def price(weight: Tensor, curvature: Curvature, levels: Sequence[Level], inputs: InputCosts | None = None) -> Prices:
    """Damage in nats per token by level name and price ("nearest", "gptq", "two_sided").

    weight: float32 [out, in]. inputs: the costs of the curvature's H, where they are known.
    """
    return begin_price(weight, curvature, levels, inputs)()


def begin_price(
    weight: Tensor, curvature: Curvature, levels: Sequence[Level], inputs: InputCosts | None = None, begin: Begin = now
) -> Callable[[], Prices]:
    """Starts `price` and returns what waits for it. begin: what starts its compiled loops."""
    inputs = inputs or InputCosts.of(curvature.h, any(map(rotates, levels)))
    scalar, rotated = [x for x in levels if not rotates(x)], [x for x in levels if rotates(x)]
    found = _scalar_prices(weight, curvature, scalar, inputs, begin)
    others = _rotated_prices(weight, curvature, rotated, inputs)
    return lambda: found() | others


def _scalar_prices(
    weight: Tensor, curvature: Curvature, levels: Sequence[Level], inputs: InputCosts, begin: Begin
) -> Callable[[], Prices]:
    if not levels:
        return dict
    weight, (rows, fed_rows) = _sample(weight, inputs.plain, diagonal(curvature.g), _outputs(curvature.g))
    coarse = {x: replace(x, bits=min(x.bits, MEASURED_BITS)) if x.format == "int" else x for x in levels}
    costs = {x: _row_costs(weight, x, inputs.plain, inputs.fed, begin) for x in dict.fromkeys(coarse.values())}

    def found() -> Prices:
        errors = {}
        for level, row_costs in costs.items():
            plain, clipped = row_costs()
            errors[level] = {
                "nearest": 0.5 * curvature.share * float(rows @ plain),
                "gptq": 0.5 * curvature.share * float(rows @ clipped),
                "two_sided": 0.5 * curvature.share * float(fed_rows @ clipped),
            }
        finer = {x: ((2**y.bits - 1) / (2**x.bits - 1)) ** 2 for x, y in coarse.items()}
        return {x.name: {k: v * finer[x] for k, v in errors[y].items()} for x, y in coarse.items()}

    return found


def _rotated_prices(weight: Tensor, curvature: Curvature, levels: Sequence[Level], inputs: InputCosts) -> Prices:
    """Of grids for Gaussian weights: their distortion is known, and the rotation leaves every row's energy as it is."""
    if not levels or inputs.rotated is None:
        return {}
    energy = float(weight.square().mean())
    rows = curvature.g if curvature.g.ndim == 1 else rotate_both(curvature.g)
    outside, (inside, fed_inside, across) = float(diagonal(rows).sum()), inputs.rotated
    both = {"nearest": outside * inside, "gptq": outside * fed_inside}
    both["two_sided"] = float(_outputs(rows, falling=False).sum()) * fed_inside
    gains = {"nearest": torch.ones(()), "gptq": across, "two_sided": across * _gain(rows, OUTPUT_SHRINKAGE, False)}
    unit = 0.5 * curvature.share * energy
    return {
        level.name: {k: unit * v * _distortion(level) * float(swelling(level.bits, gains[k])) for k, v in both.items()}
        for level in levels
    }


def _distortion(level: Level) -> float:
    """Mean squared error on a unit Gaussian."""
    return LATTICE if level.format == "lattice" else distortion(level.bits)


def _inputs(moment: Tensor) -> Tensor:
    """Cost of rounding errors at each input under feedback as the solvers do it."""
    return feedback_cost(moment, INPUT_SHRINKAGE, DAMPING)


def _outputs(moment: Tensor, falling: bool = True) -> Tensor:
    """The same at each output."""
    return feedback_cost(moment, OUTPUT_SHRINKAGE, DAMPING, falling)


def _gain(moment: Tensor, shrinkage: float, falling: bool) -> Tensor:
    """See `feedback_gain`; 1 for a diagonal [n]."""
    if moment.ndim == 1:
        return torch.ones(())
    ordered = permute(moment, falling_order(moment)) if falling else moment
    return feedback_gain(inverse_factor(shrink(ordered, shrinkage), DAMPING)[0])


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


def _row_costs(
    weight: Tensor, level: Level, columns: Tensor, fed_columns: Tensor, begin: Begin
) -> Callable[[], tuple[Tensor, Tensor]]:
    """What rounding errors cost in each row, [out], at the columns' costs [in].

    On the grid of the full range with `columns`; with `fed_columns` on the one that clips best for `columns`. Of formats with
    a method of their own: what that makes without statistics, for both.
    """
    if level.format in OWN:
        method = base.get(OWN[level.format])()
        made = method.encode(weight[None], level, torch.float32, base.Statistics())[0].decode()
        plain = clipped = (made - weight).square()
    elif level.format in KINDS:
        plain, clipped = (blocks.squared_errors(level.format, weight, importance) for importance in (None, columns))
    else:
        grid = grid_of(level, torch.float32)
        if isinstance(grid, IntegerGrid):
            return begin(partial(grid.row_costs, weight, columns, fed_columns))
        plain, clipped = (grid.squared_errors(weight, x) for x in (grid.fit(weight), grid.fit_clipped(weight, columns)))
    return now(lambda: (plain @ columns, clipped @ fed_columns))
