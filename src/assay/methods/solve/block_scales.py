"""The scales of ggml's blocks for given codes, moved one at a time among the numbers that the blocks can hold.

With the codes fixed, a weight is linear in d, and in the sub-scales for given d, and so on; f = 1/2 tr(G D H D^T) is then
quadratic in each sort of numbers. A sort is visited segment by segment, together all rows of a segment whose number would
move if the others stayed: their normal matrix is G o (B H B^T), B the rows' derivatives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from assay.methods.grid import blocks
from assay.methods.solve._block_moves import move_parameters
from assay.methods.solve.curvature import diagonal
from assay.model import ggml
from assay.model.ggml import KINDS, Parts
from assay.model.threads import spread

PASSES = 4
FP16 = (0.0, 0.0, 0.0, 0.0)


def tune(kind: str, frame: Parts, steps: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor) -> Parts:
    """A frame at which the steps cost no more, all [batch, ...] as in `refine.Problem`: sub-scales and mins, then d and m."""
    if kind == "mxfp4":
        return frame
    facts = KINDS[kind]
    for name in ("subs", "mins", "d", "m"):
        numbers = getattr(frame, name)
        if numbers is None:
            continue
        basis = _derivative(kind, frame, steps, name)
        away = weight - blocks.level(kind, frame, steps)
        stored = FP16
        if name in ("subs", "mins"):
            most = 2 ** facts.widths["mins"] - 1 if name == "mins" else 0
            stored = blocks.sub_ends(kind) if name == "subs" else (1, 0, 0, most)
        moved = _descend(basis, away, inputs, outputs, numbers.float(), stored)
        frame = frame._replace(**{name: moved.to(numbers.dtype)})
    return frame


def _derivative(kind: str, frame: Parts, steps: Tensor, name: str) -> Tensor:
    """Of every weight [batch, out, in] in its number of this sort."""
    facts, ones = KINDS[kind], torch.ones_like(frame.d)
    if name == "subs":
        return steps * (frame.d * facts.unit).repeat_interleave(facts.weights, -1)
    if name == "mins":
        assert frame.m is not None
        return facts.min_sign * frame.m.repeat_interleave(facts.weights, -1).expand_as(steps)
    if name == "d":
        return steps * ggml.scale(kind, frame._replace(d=ones)).repeat_interleave(facts.group, -1)
    added = ggml.offset(kind, frame._replace(m=ones))
    assert added is not None
    return added.repeat_interleave(facts.group, -1)


def _descend(basis: Tensor, away: Tensor, inputs: Tensor, outputs: Tensor, numbers: Tensor, stored: tuple[float, ...]) -> Tensor:
    """The numbers [batch, out, segments] moved; away: weight - decoded [batch, out, in]."""
    count = numbers.shape[-1]
    size = away.shape[-1] // count
    through, found, own_weight = outputs @ away, numbers.clone(), diagonal(outputs)
    given = (tuple(np.float32(x) for x in stored), PASSES)
    for s in range(count):
        own, present = slice(s * size, (s + 1) * size), numbers[..., s]
        part = basis[..., own]
        bent, slope = part @ inputs[:, own, own], ((through @ inputs[..., own]) * part).sum(-1)
        curvature = (bent * part).sum(-1) * own_weight
        rows = (_nearest(present + slope / curvature, stored) != present).any(0).nonzero()[:, 0]
        if not len(rows):
            continue
        all_move = 2 * len(rows) > len(own_weight[0])  # or most, which would need copies of a large matrix
        rows = torch.arange(len(own_weight[0])) if all_move else rows
        whole = outputs if all_move else outputs[:, :, rows]
        normal = ((outputs if all_move else whole[:, rows]) * (bent[:, rows] @ part[:, rows].mT)).contiguous()
        values = present[:, rows].contiguous()
        spread(move_parameters, len(values), given, (normal, slope[:, rows].contiguous(), values))
        through[..., own] -= whole @ (part[:, rows] * (values - present[:, rows])[..., None])
        found[:, rows, s] = values
    return found


def _nearest(wanted: Tensor, stored: tuple[float, ...]) -> Tensor:
    """The numbers that exist nearest to those wanted; NaN stays. See `move_parameters`."""
    factor, added, least, greatest = stored
    if factor == 0:
        return wanted.clamp(-65504, 65504).half().float()
    return (((wanted - added) / factor).round() * factor + added).clamp(least, greatest)
