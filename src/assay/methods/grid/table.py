"""Grids given by a table of values: floats, normal-floats, power laws, shifts, ternary and binary levels.

    decoded = values[code] * scale

The product is rounded once to the dtype of the weights. Which table is open (see `values`), and so
is how scales are stored (see `scales`): both are fixed before any code is chosen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
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
from assay.methods.grid.scales import (
    SCALE_BITS,
    ScaleFormat,
    ceil_e8m0,
    floor_e8m0,
    round_e8m0,
    round_float,
    round_nvfp4,
    smallest,
    tensor_scale,
)
from assay.model.threads import spread

WIDENINGS = (1.1, 1.2, 1.3, 1.4, 1.5)
"""Ranges tried by `fit_clipped` beyond the covering one: floats are coarse near their end, so leaving it empty may pay."""

REFITS = 3
"""How often `fit_clipped` moves each scale to the least-squares optimum of the codes it gives."""


@dataclass(frozen=True)
class TableGrid:
    """Sorted `values`, 2 to 256 of both signs, times one scale per group of inputs of one row (None: the row).

    scale_dtype: of decoded weights, and of scales where scale_format is "dtype". Other scale formats
    take 8 bits a group and "nvfp4" 32 more a matrix, see `scales`; the scales of an `Affine` are
    their exact products in scale_dtype.
    """

    values: tuple[float, ...]
    group_size: int | None
    scale_dtype: torch.dtype = torch.bfloat16
    scale_format: ScaleFormat = "dtype"

    def __post_init__(self) -> None:
        check_storage(self.group_size, self.scale_dtype)
        if not 2 <= len(self.values) <= 256 or any(a >= b for a, b in pairwise(self.values)):
            raise ValueError("a table holds 2 to 256 different values in rising order")
        if not -torch.inf < self.values[0] < 0 < self.values[-1] < torch.inf:
            raise ValueError("a table holds finite values of both signs")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level; if so it decodes exactly."""
        return 0 in self.values

    @property
    def mirrored(self) -> bool:
        """Whether a negative scale gives other levels, so that `fit_clipped` also tries those."""
        return self.scale_format == "dtype" and any(a != -b for a, b in zip(self.values, reversed(self.values), strict=True))

    @cached_property
    def fine(self) -> bool:
        """Whether rounding to `scale_dtype` can move a level by more than 1/16 of its distance to the next."""
        rounding = torch.finfo(self.scale_dtype).eps / 2
        return any(max(-a, b) * rounding > (b - a) / 16 for a, b in pairwise(self.values))

    @property
    def bits_per_weight(self) -> float:
        """As `stored_bits`, but a grid with one group per row counts 0 for its scales."""
        return self.bits if self.group_size is None else self.stored_bits(self.group_size)

    @property
    def tensor_bits(self) -> int:
        """Bits stored once per matrix, besides the table itself."""
        return 32 if self.scale_format == "nvfp4" else 0

    def stored_bits(self, inputs: int) -> float:
        """Stored bits per weight of rows of `inputs` weights, without `tensor_bits`."""
        scale = 8 * self.scale_dtype.itemsize if self.scale_format == "dtype" else SCALE_BITS
        return self.bits + scale / (self.group_size or inputs)

    def groups(self, inputs: int) -> int:
        """How many groups a row of `inputs` weights has; ValueError if it cannot be cut evenly."""
        return group_count(inputs, self.group_size)

    # ---- fitting -------------------------------------------------------------------------

    def fit(self, weight: Tensor) -> Affine:
        """The smallest scales that cover every weight of [..., out, in], up to their rounding.

        "e8m0" takes the rule of the Microscaling formats instead, see `scales.floor_e8m0`, which may
        clip: the largest weight of a block can lie up to a third above what E2M1 reaches.
        """
        weights = self._grouped(weight)
        if self.scale_format == "e8m0":
            scale = self._microscale(weights)
        else:
            scale = self.round_scale(self._cover(weights))
        return self._affine(scale)

    def fit_clipped(self, weight: Tensor, importance: Tensor | None = None, shrinks: Sequence[float] = SHRINKS) -> Affine:
        """The scales with the smallest weighted rounding error among several ranges, then refitted.

        Tries `fit`, the covering scale times each of `shrinks` and `WIDENINGS` (powers of two: from the covering
        one down to that of the smallest range), both signs if the table is `mirrored`, and from the best
        of them `REFITS` times the least-squares scale of the codes it gives.

        weight: [..., out, in]. importance: what a squared error costs, [..., in] for one number
        per input (diag H) or [..., out, in]; None: all equal.
        """
        weights = self._grouped(weight)
        search = self._search(weight, importance)
        fixed = self.fit(weight).scale
        rounded = self._rounding(fixed)
        cover = self._cover(weights)
        if self.scale_format == "e8m0":
            halvings = range(1 + math.ceil(-math.log2(min((1.0, *shrinks)))))
            trials = [fixed.float(), *(ceil_e8m0(cover / 2**i, self.scale_dtype).float() for i in halvings)]
        else:
            trials = [fixed.float(), *(rounded(cover * factor).float() for factor in (*shrinks, *WIDENINGS))]
        if self.mirrored:
            cover = self._cover(-weights)
            trials += [-rounded(cover * factor).float() for factor in (1.0, *shrinks, *WIDENINGS)]
        best, free = search(torch.stack(trials))
        for _ in range(REFITS):
            refitted = torch.where(free / best > 1 / 3, free, best)
            best, free = search(torch.stack([best, rounded(refitted).float()]))
        return self._affine(best.to(self.scale_dtype))

    def _cover(self, weights: Tensor) -> Tensor:
        """The smallest scale that covers each group of [..., out, groups, size], [..., out, groups]."""
        low, high = weights.amin(-1).clamp(max=0), weights.amax(-1).clamp(min=0)
        return torch.maximum(high / self.values[-1], low / self.values[0])

    def _microscale(self, weights: Tensor) -> Tensor:
        largest = weights.abs().amax(-1)
        scale = floor_e8m0(largest, self.values[-1], self.scale_dtype)
        return torch.where(largest > 0, scale, self.round_scale(largest))

    def _affine(self, scale: Tensor) -> Affine:
        return Affine(scale, torch.zeros_like(scale, dtype=torch.uint8))

    def round_scale(self, scale: Tensor) -> Tensor:
        """Scales [..., out, groups] as they are stored: finite, never 0, and positive unless `mirrored`.

        A group without weights gets what decodes them to 0, or next to it where 0 is no level.
        """
        return self._rounding(scale)(scale)

    def _rounding(self, scale: Tensor) -> Callable[[Tensor], Tensor]:
        """How scales are rounded in a matrix whose scales are `scale` [..., out, groups]."""
        empty, dtype = 1.0 if self.has_zero else smallest(self.scale_dtype), self.scale_dtype
        if self.scale_format == "nvfp4":
            # half the dtype's range, so that a product rounded up still is within it
            whole = tensor_scale(scale.abs().clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max / 2))
            return lambda s: round_nvfp4(s.abs(), whole, dtype)
        if self.scale_format == "e8m0":
            return lambda s: round_e8m0(torch.where(s == 0, empty, s.abs()), dtype)
        return lambda s: round_float(torch.where(s == 0, empty, s), dtype)

    # ---- the search ----------------------------------------------------------------------

    def _search(self, weight: Tensor, importance: Tensor | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function of trial scales [trials, ..., out, groups], float32: group by group the best, and the
        least-squares scale of the codes that it gives."""
        if compiled.runs_on(weight):
            return self._search_compiled(weight, importance)
        weights, groups = self._grouped(weight), self.groups(weight.shape[-1])
        cost = torch.ones(()) if importance is None else importance_in_groups(importance, weight, groups)

        def search(trials: Tensor) -> tuple[Tensor, Tensor]:
            best, free, error = trials[0], trials[0], torch.full_like(trials[0], torch.inf)
            for scale in trials:
                steps = self._snap(weights, scale[..., None])
                trial = ((self.level(steps, scale[..., None]) - weights).square() * cost).sum(-1)
                along, length = (cost * weights * steps).sum(-1), (cost * steps.square()).sum(-1)
                wins = trial < error
                best = torch.where(wins, scale, best)
                free = torch.where(wins, torch.where(length > 0, along / length, scale), free)
                error = torch.where(wins, trial, error)
            return best, free

        return search

    def _search_compiled(self, weight: Tensor, importance: Tensor | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`_search` by `compiled.scale_search`."""
        costs = flat_costs(weight, importance)
        facts = (self.fine, compiled.ROUNDING[self.scale_dtype], self.table)

        def search(trials: Tensor) -> tuple[Tensor, Tensor]:
            by_row = trials.reshape(len(trials), *costs.weight.shape[:2], -1).permute(1, 2, 0, 3).contiguous()
            best, free = torch.empty_like(by_row[:, :, 0]), torch.empty_like(by_row[:, :, 0])
            for m, shared in enumerate(costs.shared):
                rows = (costs.weight[m], costs.each[m], by_row[m], best[m], free[m])
                spread(compiled.scale_search, len(rows[0]), (*facts, shared.numpy()), rows)
            return best.view(trials.shape[1:]), free.view(trials.shape[1:])

        return search

    # ---- encoding ------------------------------------------------------------------------

    @property
    def table(self) -> NDArray[np.float32]:
        """See `compiled.look_up`."""
        return _lookup(self.values, torch.device("cpu")).numpy()

    def encode(self, weight: Tensor, affine: Affine) -> Tensor:
        """Codes [..., out, in] (uint8, indices into `values`) of the levels nearest to `weight`."""
        steps = self._snap(self._grouped(weight), affine.scale.float()[..., None])
        return self.codes(steps, steps).reshape(weight.shape)

    def decode(self, codes: Tensor, affine: Affine) -> Tensor:
        """The weights [..., out, in] in `scale_dtype`."""
        steps = self._lookup(codes.device)[0][codes.int()].unflatten(-1, (affine.scale.shape[-1], -1))
        return (steps * affine.scale.float()[..., None]).to(self.scale_dtype).reshape(codes.shape)

    def squared_errors(self, weight: Tensor, affine: Affine) -> Tensor:
        """What rounding `weight` to nearest costs at each weight, [..., out, in], float32."""
        weights, scale = self._grouped(weight), affine.scale.float()[..., None]
        return (self.level(self._snap(weights, scale), scale) - weights).square_().reshape(weight.shape)

    def centred(self, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, lowest value, highest value) as float32."""
        scale = affine.scale.float()
        return scale, torch.full_like(scale, self.values[0]), torch.full_like(scale, self.values[-1])

    def per_weight(self, affine: Affine, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """`centred` repeated over each group's inputs, [..., out, in]."""
        return over_inputs(affine, inputs, self.centred(affine))

    def snap(self, values: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The table's values, as float32, whose products with `scale` are nearest to float32 `values`; broadcasts.

        A tie of values / scale goes to the value an even number of places from 0 (from the smallest
        positive one where the table lacks 0): on floats and integers that is round half to even. If the
        levels lie so dense that rounding to `scale_dtype` matters (`fine`), the neighbour on the value's
        side is compared as well. low, high: unused, a table ends where it ends.
        """
        return self._snap(values, scale)

    def _snap(self, values: Tensor, scale: Tensor) -> Tensor:
        steps, place = self._lookup(values.device)[0], self._place(values, scale)
        chosen = steps[place]
        if not self.fine:
            return chosen
        error = values - self.level(chosen, scale)
        beside = place + torch.where(error * scale > 0, 1, -1)
        other = steps[beside.clamp(0, len(steps) - 1)]
        closer = (values - self.level(other, scale)).abs() < error.abs()
        return torch.where(closer, other, chosen)

    def _place(self, values: Tensor, scale: Tensor) -> Tensor:
        """Indices (int32) of the values nearest to `values` / `scale`."""
        return torch.bucketize((values / scale).contiguous(), self._lookup(values.device)[1], out_int32=True)

    def beside(self, steps: Tensor, side: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The next value above (`side` > 0) or below; past the end the one on the other side."""
        places, last = self.codes(steps, low).int(), len(self.values) - 1
        moved = places + side.sign().int()
        moved = torch.where((moved < 0) | (moved > last), places - side.sign().int(), moved)
        return self._lookup(steps.device)[0][moved]

    def level(self, steps: Tensor, scale: Tensor) -> Tensor:
        """What values decode to, as float32; rounded once to `scale_dtype`."""
        return (steps * scale).to(self.scale_dtype).float()

    def codes(self, steps: Tensor, low: Tensor) -> Tensor:
        """Indices (uint8) into `values` of exactly those values."""
        table = self._lookup(steps.device)[0][: len(self.values)]
        return torch.searchsorted(table, steps.contiguous(), out_int32=True).to(torch.uint8)

    # ---- shapes --------------------------------------------------------------------------

    def _grouped(self, weight: Tensor) -> Tensor:
        """`weight` as float32 [..., out, groups, group_size]."""
        return in_groups(weight, self.groups(weight.shape[-1]))

    def _lookup(self, device: torch.device) -> Tensor:
        return _lookup(self.values, device)


@lru_cache(maxsize=256)
def _lookup(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [2, 2^bits] on `device`: the values, and the largest float32 nearer to each than to the next.

    Past the end of the table the last value is repeated and the bounds are infinite.
    """
    steps = np.array(values, dtype=np.float32)
    middles = (steps[1:].astype(np.float64) + steps[:-1]) / 2
    bounds = middles.astype(np.float32)
    bounds = np.where(bounds > middles, np.nextafter(bounds, np.float32(-np.inf)), bounds)
    anchor = int(np.searchsorted(steps, 0))
    upper_is_even = (np.arange(1, len(steps)) - anchor) % 2 == 0
    bounds = np.where(upper_is_even & (bounds == middles), np.nextafter(bounds, np.float32(-np.inf)), bounds)
    width = 1 << (len(steps) - 1).bit_length()
    table = np.full((2, width), np.inf, dtype=np.float32)
    table[0] = steps[-1]
    table[0, : len(steps)], table[1, : len(bounds)] = steps, bounds
    return torch.from_numpy(table).to(device)
