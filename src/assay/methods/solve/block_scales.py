"""The scales of ggml's blocks for given codes, moved one at a time among the numbers that the blocks can hold.

With the codes fixed, a weight is linear in d, and in the sub-scales for given d, and so on; f = 1/2 tr(G D H D^T) is then
quadratic in each sort of numbers. A sort is visited segment by segment, all rows of a segment together: their normal
matrix is G o (B H B^T), B the rows' derivatives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from assay.methods.grid import blocks
from assay.methods.solve._block_moves import move_parameters
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
    through, found = outputs @ away, numbers.clone()
    given = (tuple(np.float32(x) for x in stored), PASSES)
    for s in range(count):
        own = slice(s * size, (s + 1) * size)
        part, corner = basis[..., own], inputs[:, own, own]
        normal = (outputs * (part @ corner @ part.mT)).contiguous()
        slope = ((through @ inputs[..., own]) * part).sum(-1)
        values = numbers[..., s].contiguous()
        spread(move_parameters, len(values), given, (normal, slope, values))
        through[..., own] -= outputs @ (part * (values - numbers[..., s])[..., None])
        found[..., s] = values
    return found
