"""Evenly spaced grids: `b`-bit unsigned codes, one scale and one integer zero point per group.

    decoded = (code - zero_point) * scale        code, zero_point in 0 .. 2^b - 1

This is the weight format of GPTQ, AWQ, compressed-tensors and vLLM. The scale lives in the model's
dtype, so it is rounded to that dtype before any code is chosen: a code picked for an unrounded
scale is a code picked for a weight that no reader will ever see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.methods import compiled
from assay.methods.grid.base import (
    SHRINKS,
    Affine,
    check_storage,
    flat_costs,
    group_count,
    importance_in_groups,
    in_groups,
    over_inputs,
)
from assay.methods.grid.scales import round_float, smallest
from assay.model.threads import spread


@dataclass(frozen=True)
class IntegerGrid:
    """`bits` per code; groups of `group_size` consecutive inputs of one row (None: the whole row)."""

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 2 to 8 bits, not {self.bits}")
        check_storage(self.group_size, self.scale_dtype)

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of every group of a symmetric grid."""
        return 2 ** (self.bits - 1)

    @property
    def fine(self) -> bool:
        """Whether rounding a decoded weight to `scale_dtype` can move it past a level's middle; see `snap`."""
        return self.bits > 4 and self.scale_dtype != torch.float32

    @property
    def table(self) -> None:
        """Steps are integers."""
        return None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: code, scale, and a `bits` wide zero point unless symmetric.

        A grid with one group per row counts 0 for its parameters: their share depends on the
        row's length, which the grid does not know; `stored_bits` does.
        """
        return self.bits if self.group_size is None else self.stored_bits(self.group_size)

    def stored_bits(self, inputs: int) -> float:
        """Stored bits per weight of rows of `inputs` weights."""
        parameters = 8 * self.scale_dtype.itemsize + (0 if self.symmetric else self.bits)
        return self.bits + parameters / (self.group_size or inputs)

    def groups(self, inputs: int) -> int:
        """How many groups a row of `inputs` weights has; ValueError if it cannot be cut evenly."""
        return group_count(inputs, self.group_size)

    # ---- fitting -------------------------------------------------------------------------

    def fit(self, weight: Tensor) -> Affine:
        """The min-max grid of `weight` [..., out, in]: covers 0 and every weight, clips nothing."""
        low, high = self._range(self._grouped(weight))
        return self._affine(low, high)

    def fit_clipped(self, weight: Tensor, importance: Tensor | None = None, shrinks: Sequence[float] = SHRINKS) -> Affine:
        """The grid with the smallest weighted rounding error among shrunken ranges.

        Tries the min-max range times each of `shrinks` (EasyQuant 2023, AWQ 2023), and around
        the best of them the zero points one code to either side. Always tries 1, so never worse
        than `fit` by `squared_errors`; rounded once more, decoded weights of a group can be a few percent further away.

        weight: [..., out, in]. importance: what a squared error costs, [..., in] for one number
        per input (diag H) or [..., out, in]; None: all equal.
        """
        if compiled.runs_on(weight):
            return self._fit_clipped_compiled(weight, importance, shrinks)
        grouped = self._grouped(weight)
        cost = None if importance is None else importance_in_groups(importance, weight, self.groups(weight.shape[-1]))
        low, high = self._range(grouped)
        best = self._affine(low, high)
        error = self._error(grouped, best, cost)
        for shrink in shrinks:
            best, error = self._better(grouped, cost, best, error, self._affine(low * shrink, high * shrink))
        if not self.symmetric:
            centre = best.zero_point.int()
            for shift in (-1, 1):
                moved = Affine(best.scale, (centre + shift).clamp(0, self.top).to(torch.uint8))
                best, error = self._better(grouped, cost, best, error, moved)
        return best

    def _fit_clipped_compiled(self, weight: Tensor, importance: Tensor | None, shrinks: Sequence[float]) -> Affine:
        """`fit_clipped` by `compiled.clip_search`."""
        costs = flat_costs(weight, importance)
        matrices, rows, columns = costs.weight.shape
        groups = self.groups(columns)
        scales, zeros = torch.empty(matrices, rows, groups), torch.empty(matrices, rows, groups, dtype=torch.uint8)
        for m in range(matrices):
            given = (*self._facts(shrinks), costs.shared[m].numpy(), groups)
            spread(compiled.clip_search, rows, given, (costs.weight[m], costs.each[m], scales[m], zeros[m]))
        shape = (*weight.shape[:-1], groups)
        return Affine(scales.to(self.scale_dtype).reshape(shape), zeros.reshape(shape))

    def row_costs(self, weight: Tensor, cost: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """What rounding a weight [out, in] to nearest costs in each row, [out], float32.

        By the grid of `fit` with `cost` [in] for a squared error; by that of `fit_clipped` for `cost`, with `other` [in].
        """
        if not compiled.runs_on(weight):
            affines = (self.fit(weight), self.fit_clipped(weight, cost))
            plain, clipped = (self.squared_errors(weight, affine) for affine in affines)
            return plain @ cost, clipped @ other
        plain, clipped = torch.empty(2, len(weight))
        given = (*self._facts(SHRINKS), cost.float().numpy(), other.float().numpy(), self.groups(weight.shape[1]))
        spread(compiled.clip_costs, len(weight), given, (weight.float().contiguous(), plain, clipped))
        return plain, clipped

    def _facts(self, shrinks: Sequence[float]) -> tuple[Any, ...]:
        """What `compiled.clip_search` wants to know first."""
        dtype, tried = self.scale_dtype, np.array((1.0, *(s for s in shrinks if s != 1)), dtype=np.float32)
        return (
            np.float32(self.top), self.symmetric, self.fine, compiled.ROUNDING[dtype],
            np.float32(smallest(dtype)), np.float32(torch.finfo(dtype).max), tried,
        )  # fmt: skip

    def _better(self, grouped: Tensor, cost: Tensor | None, best: Affine, error: Tensor, trial: Affine) -> tuple[Affine, Tensor]:
        """Group by group the better of two grids, and its error."""
        trial_error = self._error(grouped, trial, cost)
        wins = trial_error < error
        merged = Affine(*(torch.where(wins, new, old) for new, old in zip(trial, best, strict=True)))
        return merged, torch.where(wins, trial_error, error)

    def _error(self, grouped: Tensor, affine: Affine, cost: Tensor | None) -> Tensor:
        """Weighted squared rounding error of each group, [..., out, groups]."""
        difference = self._squared_errors(grouped, affine)
        return (difference if cost is None else difference.mul_(cost)).sum(-1)

    def squared_errors(self, weight: Tensor, affine: Affine) -> Tensor:
        """What rounding `weight` to nearest costs at each weight, [..., out, in], float32.

        That decoded weights are rounded to `scale_dtype` isn't counted: it would triple the time of `fit_clipped`, which
        compares by the same errors. In bf16 it adds below 0.1% at 4 bits and fewer, but 12% at 8.
        """
        if not compiled.runs_on(weight):
            return self._squared_errors(self._grouped(weight), affine).reshape(weight.shape)
        flat = weight.detach().float().reshape(-1, weight.shape[-1]).contiguous()
        parameters = (p.float().reshape(len(flat), -1).contiguous() for p in affine)
        errors = torch.empty_like(flat)
        facts = (np.float32(self.top), self.fine, compiled.ROUNDING[self.scale_dtype])
        spread(compiled.nearest_errors, len(flat), facts, (flat, *parameters, errors))
        return errors.view(weight.shape)

    def _squared_errors(self, grouped: Tensor, affine: Affine) -> Tensor:
        scale, low, high = (p[..., None] for p in self.centred(affine))
        return self.snap(grouped, scale, low, high).mul_(scale).sub_(grouped).square_()

    def _range(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each group, the range widened to hold 0."""
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def _affine(self, low: Tensor, high: Tensor) -> Affine:
        """The grid that spans [low, high]; the scale rounded to its dtype before the zero point is set."""
        if self.symmetric:
            scale = self.round_scale(torch.maximum(high, -low) / (self.top / 2))
            return Affine(scale, torch.full_like(scale, self.middle, dtype=torch.uint8))
        scale = self.round_scale((high - low) / self.top)
        zero = (-low / scale.float()).round().clamp(0, self.top)
        return Affine(scale, zero.to(torch.uint8))

    def round_scale(self, scale: Tensor) -> Tensor:
        """`scale` in the dtype it is stored in: finite, and positive even for a group of zeros."""
        return round_float(torch.where(scale > 0, scale, torch.ones_like(scale)), self.scale_dtype)

    # ---- encoding ------------------------------------------------------------------------

    def encode(self, weight: Tensor, affine: Affine) -> Tensor:
        """Codes [..., out, in] (uint8) of the levels nearest to `weight`."""
        scale, low, high = (p[..., None] for p in self.centred(affine))
        return self.codes(self.snap(self._grouped(weight), scale, low, high), low).reshape(weight.shape)

    def decode(self, codes: Tensor, affine: Affine) -> Tensor:
        """The weights [..., out, in] in `scale_dtype`, exactly as compressed-tensors' reader makes them."""
        grouped = codes.unflatten(-1, (affine.scale.shape[-1], -1)).int()
        signed = (grouped - affine.zero_point[..., None].int()).to(self.scale_dtype)
        return (signed * affine.scale[..., None]).reshape(codes.shape)

    def centred(self, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, lowest, highest) as float32, the code range counted from the zero point."""
        zero = affine.zero_point.float()
        return affine.scale.float(), -zero, self.top - zero

    def snap(self, values: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Codes counted from the zero point, as float32, nearest to float32 `values`; broadcasts.

        Decoded weights are rounded to `scale_dtype`, which moves a level by up to half a step at
        8 bits in bf16 (255 steps, 8 bits of mantissa). So from 5 bits on the neighbour on the
        value's side is compared as well; below, levels move by less than 3% of a step.
        """
        codes = torch.clamp((values / scale).round_(), low, high)
        if not self.fine:
            return codes
        error = values - self.level(codes, scale)
        neighbour = torch.clamp(codes + error.sign(), low, high)
        closer = (values - self.level(neighbour, scale)).abs() < error.abs()
        return torch.where(closer, neighbour, codes)

    def beside(self, steps: Tensor, side: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """See `Grid.beside`."""
        moved = steps + side
        return torch.where((moved > high) | (moved < low), steps - side, moved)

    def codes(self, steps: Tensor, low: Tensor) -> Tensor:
        """The stored codes (uint8) of codes counted from the zero point; low: minus the zero point."""
        return (steps - low).to(torch.uint8)

    def level(self, centred: Tensor, scale: Tensor) -> Tensor:
        """What codes counted from the zero point decode to, as float32; rounded once to `scale_dtype`."""
        return (centred * scale).to(self.scale_dtype).float()

    # ---- shapes --------------------------------------------------------------------------

    def per_weight(self, affine: Affine, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """`centred` repeated over each group's inputs, [..., out, in]."""
        return over_inputs(affine, inputs, self.centred(affine))

    def _grouped(self, weight: Tensor) -> Tensor:
        """`weight` as float32 [..., out, groups, group_size]."""
        return in_groups(weight, self.groups(weight.shape[-1]))
