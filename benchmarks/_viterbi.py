"""How fast a trellis is encoded, ours beside a Viterbi search of whole-tensor operations in torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from assay.methods.base import Statistics
from assay.methods.grid.trellis import encode
from assay.methods.quantize.trellis import TrellisCoded
from assay.model.level import Level
from assay.model.trellis import Trellis

Result = TypeVar("Result")
SEQUENCES, LENGTH = 64, 1024
SIDE = 512
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """One way to encode. error: mean squared on a unit Gaussian, None where feedback shapes it."""

    name: str
    bits: float
    weights_a_second: float
    error: float | None


def viterbi(code: Trellis, sequences: Tensor) -> Tensor:
    """Nearest values that a trellis of equal steps gives sequences [n, length] from any start, all sequences at once."""
    step, tables, (count, length) = code.steps[0], code.tables()[0], sequences.shape
    cost = torch.zeros(count, 1 << code.state_bits)
    came = torch.empty(length, count, 1 << (code.state_bits - step), dtype=torch.uint8)
    for t in range(length):
        groups, best = cost.view(count, 1 << step, -1).min(1)
        came[t] = best
        cost = groups.repeat_interleave(1 << step, 1) + (sequences[:, t, None] - tables).square()
    state, path = cost.argmin(1), torch.empty(count, length, dtype=torch.long)
    for t in reversed(range(length)):
        path[:, t] = state
        group = state >> step
        state = group + (came[t].gather(1, group[:, None])[:, 0].long() << (code.state_bits - step))
    return tables[path]


def speeds() -> list[Speed]:
    """Weights a second on one core, best of a few."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(SEQUENCES, LENGTH, generator=generator)
    matrix = 0.02 * torch.randn(1, SIDE, SIDE, generator=generator)
    sample = torch.randn(4 * SIDE, SIDE, generator=generator) * torch.linspace(0.5, 2, SIDE)
    moment = (sample.T @ sample / len(sample))[None]
    found = []
    for bits in (2, 3, 4):
        code, level = Trellis.of_rate(bits), Level(bits, None, True, "trellis")
        for name, search in (
            ("torch, whole tensors", lambda code=code: viterbi(code, sequences)),
            ("ours, rows alone", lambda code=code: encode(code, sequences).values),
        ):
            values, taken = _timed(search)
            error = float((values - sequences).square().mean())
            found.append(Speed(name, bits, sequences.numel() / taken, error))
        given = Statistics(h=moment, g=moment)
        taken = _timed(lambda level=level, given=given: TrellisCoded().encode(matrix, level, torch.bfloat16, given))[1]
        found.append(Speed("ours, a matrix with feedback on both sides", bits, matrix.numel() / taken, None))
    return found


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the least processor seconds that it took."""
    times = []
    for _ in range(REPEATS + 1):  # the first compiles
        began = time.process_time()
        result = work()
        times.append(time.process_time() - began)
    return result, min(times[1:])
