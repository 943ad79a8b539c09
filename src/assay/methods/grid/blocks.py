"""ggml's blocks as grids: scales that the blocks can hold, and the nearest codes for them.

A fitted block format is a `Parts` whose codes are yet to come, its "frame": d, m, subs and mins as they are stored. So
nothing that follows is chosen for a scale that no reader will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.methods.grid import _blocks, _codebook
from assay.methods.grid.base import Affine, Grid, flat_costs
from assay.methods.grid.integer import IntegerGrid
from assay.methods.grid.table import TableGrid
from assay.methods.grid.values import TERNARY
from assay.model import ggml
from assay.model.ggml import KINDS, Parts
from assay.model.threads import spread

REACH = 4
"""Vectors of a codebook that a search tries for each number in one, those nearest to its rounded magnitudes; see `Codebook`."""
TRIES, FEW_TRIES = 4, 2
"""Sub-scales that the group with the largest scale of a block is offered; few where codes are vectors, which are slow to find."""
STRETCHES, FEW_STRETCHES = tuple(0.6 + 0.1 * i for i in range(7)), (0.7, 0.85, 1.0, 1.15)
"""Of the scale that covers all of a group; as low a damage on `pebble` for vectors, up to 6% more for single codes."""
RANGES = (1.0, 0.9, 0.8, 0.7, 0.6)
TINY = 1e-30
"""Stands for a scale of 0, so that nothing is divided by it."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Which vectors of magnitudes are near.

    bounds: float32, between the magnitudes that occur, or none; nearby: float32 [patterns, v, reach], for every rounding of v
    numbers to such magnitudes the nearest vectors first, for no bounds all vectors; even: the number of signs is even.
    """

    bounds: NDArray[np.float32]
    nearby: NDArray[np.float32]
    even: bool

    @property
    def parts(self) -> tuple[NDArray[np.float32], NDArray[np.float32], bool]:
        """As the compiled loops take it."""
        return self.bounds, self.nearby, self.even


NO_TABLE = np.zeros((2, 2), dtype=np.float32)
NO_BOOK = Codebook(np.zeros(0, np.float32), np.zeros((1, 8, 1), np.float32), False)


@lru_cache(maxsize=16)
def codebook(kind: str, reach: int | None = REACH) -> Codebook | None:
    """Of a kind that has one; reach None: every code is tried, and the nearest is found for certain."""
    if not KINDS[kind].codebook:
        return None
    magnitudes = ggml.codebook(kind)
    if not reach:
        return Codebook(np.zeros(0, np.float32), magnitudes.T[None].contiguous().numpy(), KINDS[kind].even)
    levels = magnitudes.unique()
    patterns = torch.cartesian_prod(*[levels] * magnitudes.shape[1])
    tried = reach * magnitudes.shape[1]
    near = [torch.cdist(part, magnitudes).sort(dim=-1, stable=True).indices[:, :tried] for part in patterns.split(1024)]
    bounds = (levels[1:] + levels[:-1]) / 2
    return Codebook(bounds.numpy(), magnitudes[torch.cat(near)].mT.contiguous().numpy(), KINDS[kind].even)


def scalar_grid(kind: str) -> Grid:
    """The steps of a kind with a code per weight, as a grid of scales in float32."""
    facts = KINDS[kind]
    if facts.table:
        return TableGrid(tuple(float(x) for x in sorted(set(facts.table))), facts.group, torch.float32)
    if kind in ("tq1_0", "tq2_0"):
        return TableGrid(TERNARY, facts.group, torch.float32)
    return IntegerGrid(facts.widths["codes"], facts.group, False, torch.float32)


def ends(kind: str) -> tuple[float, float]:
    """The lowest and the highest step."""
    facts = KINDS[kind]
    if facts.codebook:
        top = float(ggml.codebook(kind).max())
        return -top, top
    if facts.table:
        return min(facts.table), max(facts.table)
    if kind in ("tq1_0", "tq2_0"):
        return -1, 1
    return -facts.zero, 2 ** facts.widths["codes"] - 1 - facts.zero


def sub_ends(kind: str) -> tuple[int, int, int, int]:
    """(factor, added, least, greatest) of the sub-scales that can be stored."""
    facts = KINDS[kind]
    codes = 2 ** facts.widths["subs"] - 1
    factor, added = (1, -128) if kind == "q6_k" else facts.sub
    return factor, added, added, factor * codes + added


# ---- scales ----------------------------------------------------------------------------------


def fit(kind: str, weight: Tensor) -> Parts:
    """The frame of weight [..., out, in] that covers every weight, without a search."""
    return _fit(kind, weight, None, 1, (1.0,), (1.0,))


def fit_searched(kind: str, weight: Tensor, importance: Tensor | None = None) -> Parts:
    """The frame with the smallest error of rounding to nearest that was found, block by block never worse than `fit`.

    importance: what a squared error costs, [..., in]; None: all equal.
    """
    tries, stretches = (FEW_TRIES, FEW_STRETCHES) if KINDS[kind].codebook else (TRIES, STRETCHES)
    plain, found = fit(kind, weight), _fit(kind, weight, importance, tries, stretches, RANGES)
    errors = [_block_errors(kind, weight, frame, importance) for frame in (plain, found)]
    return _choose(errors[1] <= errors[0], found, plain)


def _choose(wins: Tensor, one: Parts, other: Parts) -> Parts:
    """The frame `one` in the blocks where `wins` [..., blocks], else `other`."""

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return None
        return torch.where(wins.repeat_interleave(a.shape[-1] // wins.shape[-1], -1), a, b)

    others = (pick(a, b) for a, b in ((one.m, other.m), (one.subs, other.subs), (one.mins, other.mins)))
    return Parts(torch.where(wins, one.d, other.d), one.codes, *others)


def squared_errors(kind: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """What rounding `weight` to nearest costs at each weight, [..., out, in], on the searched frame if importance is given."""
    if "d" not in KINDS[kind].fields:
        return (weight.to(torch.float16 if kind == "f16" else torch.bfloat16).float() - weight).square()
    frame = fit(kind, weight) if importance is None else fit_searched(kind, weight, importance)
    return (level(kind, frame, nearest(kind, frame, weight, importance, REACH)) - weight).square()


def _block_errors(kind: str, weight: Tensor, frame: Parts, importance: Tensor | None) -> Tensor:
    """Weighted squared error of rounding to nearest, [..., out, blocks]."""
    error = (level(kind, frame, nearest(kind, frame, weight, importance, REACH)) - weight).square()
    if importance is not None:
        error = error * importance[..., None, :]
    return error.unflatten(-1, (frame.d.shape[-1], -1)).sum(-1)


def _fit(
    kind: str, weight: Tensor, importance: Tensor | None, tries: int, stretches: Sequence[float], ranges: Sequence[float]
) -> Parts:
    """By the compiled loops, which see one matrix at a time."""
    facts, costs = KINDS[kind], flat_costs(weight, importance)
    matrices, rows, columns = costs.weight.shape
    blocks, groups = columns // facts.weights, columns // facts.group
    d, m = torch.empty(matrices, rows, blocks), torch.empty(matrices, rows, blocks)
    subs = torch.empty(matrices, rows, groups if "subs" in facts.fields else 0)
    mins = torch.empty(matrices, rows, groups if "mins" in facts.fields else 0)
    low, high = (np.float32(x) for x in ends(kind))
    for n in range(matrices):
        price = costs.shared[n].numpy()
        if "m" in facts.fields:
            most = np.float32(2 ** facts.widths.get("subs", 0) - 1)
            factors = np.array(ranges, dtype=np.float32)
            pairs = (high, facts.min_sign > 0, most, tries, factors, facts.group, price)
            spread(_blocks.fit_pairs, rows, pairs, (costs.weight[n], d[n], m[n], subs[n], mins[n]))
            continue
        sub = tuple(np.float32(x) for x in (sub_ends(kind) if subs.shape[-1] else (1, 0, 1, 1)))
        factors = np.array(stretches if tries > 1 else (1.0,), dtype=np.float32)
        rounding = (*_rounding(kind), -low != high or sub[2] < 0, kind == "mxfp4")
        given = (*rounding, sub, np.float32(facts.unit), tries, factors, facts.group, price)
        spread(_blocks.fit_scales, rows, given, (costs.weight[n], d[n], subs[n]))
    shape = weight.shape[:-1]
    if kind == "mxfp4":
        d = d.clamp_min(2.0**-100)
    return Parts(
        d.reshape(*shape, blocks), d.new_empty(0),
        facts.min_sign * -m.reshape(*shape, blocks) if "m" in facts.fields else None,
        subs.short().reshape(*shape, groups) if subs.shape[-1] else None,
        mins.short().reshape(*shape, groups) if mins.shape[-1] else None,
    )  # fmt: skip


def _rounding(kind: str) -> tuple[Any, ...]:
    """(mode, lowest, highest step, table, codebook) as the compiled loops take them."""
    low, high = (np.float32(x) for x in ends(kind))
    book, table = codebook(kind), None
    if book is None:
        table = scalar_grid(kind).table
    mode = _blocks.BOOK if book else _blocks.INTEGERS if table is None else _blocks.TABLE
    return mode, low, high, NO_TABLE if table is None else table, (book or NO_BOOK).parts


# ---- codes -----------------------------------------------------------------------------------


def affine(kind: str, frame: Parts) -> Affine:
    """Scales of `scalar_grid`, none of them 0, and its zero points."""
    scale = ggml.scale(kind, frame)
    zero = torch.full_like(scale, KINDS[kind].zero, dtype=torch.uint8)
    return Affine(torch.where(scale == 0, TINY, scale), zero)


def shifted(kind: str, frame: Parts, weight: Tensor) -> Tensor:
    """The weight less what the frame adds to every step times scale, [..., out, in]."""
    added = ggml.offset(kind, frame)
    return weight if added is None else weight - added.repeat_interleave(KINDS[kind].group, -1)


def level(kind: str, frame: Parts, steps: Tensor) -> Tensor:
    """What steps [..., in] decode to, float32."""
    scale, added = ggml.scale(kind, frame), ggml.offset(kind, frame)
    values = steps.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
    return (values if added is None else values + added[..., None]).flatten(-2)


def nearest(kind: str, frame: Parts, weight: Tensor, importance: Tensor | None = None, reach: int | None = None) -> Tensor:
    """Steps, float32 [..., out, in], nearest to a weight of that shape.

    importance: [..., in], of use to codebooks only, where weights share a code; reach: of the search, see `codebook`.
    """
    values = shifted(kind, frame, weight)
    scale = affine(kind, frame).scale.repeat_interleave(KINDS[kind].group, -1)
    book = codebook(kind, reach)
    if book is None:
        grid = scalar_grid(kind)
        return grid.snap(values, *grid.per_weight(affine(kind, frame), weight.shape[-1]))
    return project(book, values, scale, importance)


def project(book: Codebook, values: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
    """The vectors of a codebook nearest to values / scale, both [..., out, in]."""
    costs = flat_costs(values / scale, importance)
    for n in range(len(costs.weight)):
        spread(_codebook.project, costs.weight.shape[1], (book.parts, costs.shared[n].numpy()), (costs.weight[n],))
    return costs.weight.reshape(values.shape)


def coded(kind: str, frame: Parts, steps: Tensor) -> Parts:
    """The frame with the codes of steps [..., in]."""
    facts = KINDS[kind]
    if facts.codebook:
        magnitudes = ggml.codebook(kind).int()
        powers = int(magnitudes.max() + 1) ** torch.arange(facts.vector)
        keys, order = (magnitudes * powers).sum(-1).sort()
        wanted = (steps.abs().unflatten(-1, (-1, facts.vector)).long() * powers).sum(-1)
        return frame._replace(codes=order[torch.searchsorted(keys, wanted)].short(), signs=steps < 0)
    if facts.table:
        values, order = torch.tensor(facts.table, dtype=torch.float32).sort(stable=True)
        return frame._replace(codes=order[torch.searchsorted(values, steps.contiguous())].short())
    return frame._replace(codes=(steps + facts.zero).short())
