"""Rounding to ggml's block formats for the price 1/2 tr(G D H D^T).

1. Scales searched among those that the blocks can hold, sub-scales and mins included.
2. Codes for these scales: nearest, by error feedback, or by ADMM.
3. Scales and codes in turn, one number at a time (`block_scales.tune`, `refine.descend`); neither can raise the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from assay.methods.grid import blocks
from assay.methods.solve import admm
from assay.methods.solve._block_moves import descend_vectors
from assay.methods.solve.basis import Waiting, bases
from assay.methods.solve.block_scales import tune
from assay.methods.solve.curvature import (
    DAMPING,
    JOINT_INPUT_SHRINKAGE,
    OUTPUT_SHRINKAGE,
    conditional_importance,
    damp,
    diagonal,
    falling_order,
    inverse_factor,
    permute,
    shrink,
    take_columns,
    take_rows,
    total,
)
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.gptq import FixedGrid
from assay.methods.solve.refine import Problem, descend
from assay.methods.solve.rounded import check_shapes
from assay.methods.solve.sandwich import sandwich
from assay.methods.solve.wavefront import wavefront
from assay.model.ggml import KINDS, Parts
from assay.model.threads import spare, spread

Solver = Literal["nearest", "clip", "gptq", "two_sided", "admm"]
BLOCK = 64
SETTLED = 0.01
"""Share of the price; when a round gains less in every matrix, it was the last."""
ROWS_AT_ONCE = 4096
"""Of a matrix whose rows don't depend on each other; their G is the identity, which is as large as their number squared."""


class Task(NamedTuple):
    """Matrices to be rounded; see `refine.Problem`."""

    kind: str
    weight: Tensor
    """[batch, out, in], float32"""
    inputs: Tensor
    outputs: Tensor


class Candidate(NamedTuple):
    """A frame and steps [batch, out, in] on it."""

    frame: Parts
    steps: Tensor


def solve(
    weight: Tensor,
    kind: str,
    solver: Solver,
    H: Tensor | None = None,
    G: Tensor | None = None,
    found: Waiting | None = None,
) -> Parts:
    """Round `weight` [batch, out, in] to blocks of a kind; H [batch, in, in], G [batch, out, out].

    Without H what is left of every solver is "clip", which takes the diagonal of H; "nearest" takes nothing, and "gptq"
    ignores G. found: what `bases` returned for these two, of use to "admm". Rows must be whole blocks (`Level.groups`
    checks). Raises ValueError for shapes that don't fit.
    """
    check_shapes(weight, H, G)
    weight = weight.float()
    if kind in ("f16", "bf16"):
        halves = weight.to(torch.float16 if kind == "f16" else torch.bfloat16)
        return Parts(torch.ones_like(weight), halves.contiguous().view(torch.int16))
    if H is None or solver in ("nearest", "clip"):
        importance = None if H is None or solver == "nearest" else diagonal(H)
        frame = blocks.fit(kind, weight) if solver == "nearest" else blocks.fit_searched(kind, weight, importance)
        return blocks.coded(kind, frame, blocks.nearest(kind, frame, weight, importance))
    if solver == "gptq":
        G = None
    if solver == "admm" and found is None:
        found = bases(H, G)
    if G is None and weight.shape[1] > ROWS_AT_ONCE:
        shared = _repeated(found) if found else None
        return _join([solve(part, kind, solver, H, None, shared) for part in weight.split(ROWS_AT_ONCE, 1)])
    inputs, outputs = shrink(H.float(), JOINT_INPUT_SHRINKAGE), None if G is None else shrink(G.float(), OUTPUT_SHRINKAGE)
    whole = torch.eye(weight.shape[1]).expand(len(weight), -1, -1) if outputs is None else damp(outputs, DAMPING)
    task = Task(kind, weight, damp(inputs, DAMPING), whole)
    candidate = _learn(task, found) if found else _feed(task, inputs, outputs)
    return blocks.coded(kind, *candidate) if solver == "gptq" else _finish(task, candidate)


def _repeated(found: Waiting) -> Waiting:
    shared = found()
    return lambda: shared


def _join(parts: Sequence[Parts]) -> Parts:
    """Rows one under another."""
    d, codes, *others = (None if p[0] is None else torch.cat(p, 1) for p in zip(*parts, strict=True))
    assert d is not None and codes is not None
    return Parts(d, codes, *others)


def _finish(task: Task, start: Candidate, rounds: int = 3, sweeps: int = 2) -> Parts:
    """Scales and codes in turn, then the codes as they are stored."""
    spare()  # descent on single codes uses one
    through = sandwich(task.outputs, task.inputs, task.weight.shape[1])

    def price(candidate: Candidate) -> Tensor:
        away = task.weight - blocks.level(task.kind, *candidate)
        return total(through(away) * away) / 2

    found, before = start, price(start)
    for _ in range(rounds):
        frame = tune(task.kind, *found, task.weight, task.inputs, task.outputs)
        found = Candidate(frame, _descend(task, Candidate(frame, found.steps), sweeps))
        now = price(found)
        if bool((now > (1 - SETTLED) * before).all()):
            break
        before = now
    return blocks.coded(task.kind, *found)


# ---- codes -----------------------------------------------------------------------------------


def _learn(task: Task, found: Waiting) -> Candidate:
    """ADMM on the searched scales, or rounding to nearest on them where that is better."""
    importance = diagonal(task.inputs)
    frame = blocks.fit_searched(task.kind, task.weight, importance)

    def snap(values: Tensor) -> tuple[Tensor, Tensor]:
        steps = blocks.nearest(task.kind, frame, values, importance, blocks.REACH)
        return steps, blocks.level(task.kind, frame, steps)

    start = snap(task.weight)
    return Candidate(frame, admm.iterate(task.weight, task.inputs, task.outputs, found, start, snap))


def _problem(task: Task, frame: Parts) -> Problem:
    """The same for a grid without what the frame adds to every weight."""
    return Problem(blocks.shifted(task.kind, frame, task.weight), task.inputs, task.outputs, blocks.scalar_grid(task.kind))


def _feed(task: Task, inputs: Tensor, outputs: Tensor | None) -> Candidate:
    """Error feedback along the inputs, and where the kind has a code per weight along the outputs as well."""
    if KINDS[task.kind].codebook:
        return _feed_vectors(task, inputs)
    visit = falling_order(inputs)
    factor, _ = inverse_factor(permute(inputs, visit), DAMPING)
    frame = blocks.fit_searched(task.kind, task.weight, conditional_importance(factor, visit))
    problem, affine = _problem(task, frame), blocks.affine(task.kind, frame)
    if outputs is None:
        quantizer = FixedGrid(problem.grid, affine, visit)
        column_feedback(take_columns(problem.weight, visit), factor, quantizer)
        low = problem.grid.per_weight(affine, task.weight.shape[-1])[1]
        codes = take_columns(quantizer.codes.mT, visit.argsort(-1))
        return Candidate(frame, _steps_of(problem, codes, low))
    down = falling_order(outputs)
    above, _ = inverse_factor(permute(outputs, down), DAMPING)
    parameters = tuple(_turn(p, down, visit) for p in problem.grid.per_weight(affine, task.weight.shape[-1]))
    wave = wavefront(_turn(problem.weight, down, visit), factor, above, problem.grid, parameters, 64)  # type: ignore[arg-type]
    return Candidate(frame, _turn(wave.centred, down.argsort(-1), visit.argsort(-1)))


def _steps_of(problem: Problem, codes: Tensor, low: Tensor) -> Tensor:
    table = problem.grid.table
    return codes.float() + low if table is None else torch.from_numpy(table[0])[codes.long()]


def _turn(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return take_rows(take_columns(matrix, columns), rows)


def _feed_vectors(task: Task, inputs: Tensor) -> Candidate:
    """Error feedback from one run of columns that share codes to the runs after it."""
    size = KINDS[task.kind].run
    runs = diagonal(inputs).unflatten(-1, (-1, size)).sum(-1).argsort(dim=-1, descending=True, stable=True)
    visit = (runs[..., None] * size + torch.arange(size)).flatten(-2)
    factor, _ = inverse_factor(permute(inputs, visit), DAMPING)
    importance = conditional_importance(factor, visit)
    frame = blocks.fit_searched(task.kind, task.weight, importance)
    scale = take_columns(blocks.affine(task.kind, frame).scale.repeat_interleave(KINDS[task.kind].group, -1), visit)
    price, book = importance.gather(-1, visit), blocks.codebook(task.kind)
    assert book is not None
    values, steps = take_columns(task.weight, visit).clone(), torch.empty_like(task.weight)
    for start in range(0, values.shape[-1], size):
        own, later = slice(start, start + size), slice(start + size, None)
        steps[..., own] = blocks.project(book, values[..., own], scale[..., own], price[..., own])
        away = values[..., own] - steps[..., own] * scale[..., own]
        errors = torch.linalg.solve_triangular(factor[:, own, own], away, upper=True, left=False)
        values[..., later] -= errors @ factor[:, own, later]
    return Candidate(frame, take_columns(steps, visit.argsort(-1)))


def _descend(task: Task, candidate: Candidate, sweeps: int) -> Tensor:
    """Steps moved one code at a time; f never rises."""
    frame, steps = candidate
    book = blocks.codebook(task.kind)
    if book is None:
        return descend(_problem(task, frame), steps, blocks.affine(task.kind, frame), sweeps)
    size = KINDS[task.kind].vector
    scale = blocks.affine(task.kind, frame).scale.repeat_interleave(KINDS[task.kind].group, -1).mT.contiguous()
    cells = task.inputs.unflatten(1, (-1, size)).unflatten(3, (-1, size)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    inverses, held = torch.linalg.inv(cells).contiguous(), steps.mT.contiguous().clone()
    moments = task.inputs.contiguous(), inverses, task.outputs.contiguous()
    through = (task.weight.mT - held * scale) @ task.outputs
    for _ in range(sweeps):
        for start in range(0, held.shape[1], BLOCK):
            stop = min(start + BLOCK, held.shape[1])
            gradient = task.inputs[:, start:stop] @ through
            spread(descend_vectors, len(held), (book.parts, start, stop), (*moments, through, gradient, scale, held))
    return held.mT.contiguous()
