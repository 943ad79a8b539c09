"""Second moments made usable: symmetric, positive definite, less sure of themselves, factored.

H = E[x x^T] [..., in, in] and G = E[g g^T] [..., out, out] are averages over a sample of tokens.
An error-feedback solver trusts their smallest eigenvalues most (it divides by them), and those are
what a sample gets most wrong. Shrinkage and damping take that trust back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from assay.model.threads import threads_for

INPUT_SHRINKAGE = 0.02
"""How far H moves towards its diagonal where errors are fed back along the inputs."""

JOINT_INPUT_SHRINKAGE = 0.05
"""The same where codes are then moved one by one as well: they would fit what the sample got wrong."""

OUTPUT_SHRINKAGE = 0.1
"""How far G moves: its samples are noisier than H's."""

DAMPING = 0.01
"""What is added to the diagonal, as a fraction of its mean; the usual value since GPTQ."""

MAX_DAMPING = 10.0
"""Ten times the mean diagonal: with that, any finite symmetric second moment has a Cholesky factor."""

_noted: ContextVar[list[Tensor] | None] = ContextVar("noted", default=None)


@contextmanager
def dampings() -> Iterator[list[Tensor]]:
    """What `inverse_factor` adds in this thread while the block lasts: of each call the fractions, [matrices]."""
    found: list[Tensor] = []
    outer = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(outer)


def most(found: list[Tensor], matrices: int) -> list[float]:
    """The largest of `dampings` for each of so many matrices; 0 where nothing was factored. A call of others counts for all."""
    rows = [d if len(d) == matrices else d.max().expand(matrices) for d in found]
    return [0.0] * matrices if not rows else torch.stack(rows).amax(0).tolist()


def diagonal(moment: Tensor) -> Tensor:
    """The diagonal [..., n] of [..., n, n], negative rounding errors set to 0."""
    return moment.diagonal(dim1=-2, dim2=-1).clamp(min=0)


def mean_diagonal(moment: Tensor) -> Tensor:
    """Mean of the positive diagonal entries, [...]; 1 where none is positive."""
    entries = diagonal(moment)
    alive = (entries > 0).sum(-1)
    return torch.where(alive > 0, entries.sum(-1) / alive.clamp(min=1), torch.ones_like(entries[..., 0]))


def shrink(moment: Tensor, amount: float) -> Tensor:
    """`moment` [..., n, n] moved by `amount` in [0, 1] towards its own diagonal (Ledoit and Wolf, 2004).

    The target keeps what is known best, the variances, and doubts only the correlations. Dead
    channels (diagonal 0) get the mean diagonal and no correlations: their weights are rounded to
    nearest instead of being zeroed, since a channel silent on the sample may still speak later.
    """
    entries, mean = diagonal(moment.float()), mean_diagonal(moment.float())
    dead = entries <= 0
    kept = (moment + moment.mT).float().mul_((1 - amount) / 2)
    kept.masked_fill_(dead[..., None], 0).masked_fill_(dead[..., None, :], 0)
    kept.diagonal(dim1=-2, dim2=-1).copy_(torch.where(dead, mean[..., None], entries))
    return kept


def damp(moment: Tensor, amount: float | Tensor) -> Tensor:
    """`moment` plus `amount` (a number, or one per matrix) times its mean diagonal on the diagonal."""
    amount = torch.as_tensor(amount, dtype=moment.dtype, device=moment.device)
    return moment.diagonal_scatter(diagonal(moment) + (amount * mean_diagonal(moment))[..., None], dim1=-2, dim2=-1)


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """(U, damping used): U upper triangular with inv(moment + damping) = U^T U, [..., n, n] float32.

    Damping is a fraction of the mean diagonal; for the matrices that are still not positive
    definite it is doubled (from 1e-6 at least) until they are. Reversing rows and columns turns the
    lower Cholesky factor into an upper one, whose inverse is U: one factorisation, one triangular inverse,
    and the inverse itself, which would square the condition number, is never formed. So float32 is enough: float64
    changes the damage of GPTQ and of two-sided feedback by 0.01% at most. Works in one matrix.
    """
    mean = mean_diagonal(moment).double()
    amount = torch.full_like(mean, float(damping))
    while True:
        lower = moment.flip(-1, -2).float()
        lower.diagonal(dim1=-2, dim2=-1).clamp_(min=0).add_((amount * mean)[..., None])
        failed = _factor_in_place(lower) != 0
        if not bool(failed.any()):
            break
        if float(amount.max()) > MAX_DAMPING:
            raise ValueError("a second moment has no Cholesky factor even when damped tenfold; is it one?")
        amount = torch.where(failed, (2 * amount).clamp(min=1e-6), amount)
    if (noted := _noted.get()) is not None:
        noted.append(amount.flatten())
    _invert_in_place(lower)
    return lower.flip(-1, -2), float(amount.max())


def _factor_in_place(moment: Tensor, block: int = 256) -> Tensor:
    """Replace [..., n, n] by its lower Cholesky factor; returns LAPACK's `info` [...], 0 where there is one.

    Block column by block column: LAPACK's own factor has other last bits in several threads than in one.
    """
    failed = torch.zeros(moment.shape[:-2], dtype=torch.int32, device=moment.device)
    for start in range(0, moment.shape[-1], block):
        stop = min(start + block, moment.shape[-1])
        column, before = moment[..., start:, start:stop], moment[..., start:, :start]
        column.sub_(before @ before[..., : stop - start, :].mT)
        with threads_for(0):
            corner, info = torch.linalg.cholesky_ex(column[..., : stop - start, :])
        column[..., : stop - start, :] = corner
        below = column[..., stop - start :, :]
        below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
        moment[..., :start, start:stop] = 0
        failed |= info
    return failed


def _invert_in_place(lower: Tensor, block: int = 256) -> None:
    """Replace lower triangular matrices [..., n, n] by their inverses, block column by block column from the last."""
    size = lower.shape[-1]
    for start in range((size - 1) // block * block, -1, -block):
        stop = min(start + block, size)
        corner = lower[..., start:stop, start:stop]
        eye = torch.eye(stop - start, dtype=lower.dtype, device=lower.device).expand_as(corner)
        corner.copy_(torch.linalg.solve_triangular(corner, eye, upper=False))
        below = lower[..., stop:, start:stop]
        below.copy_(lower[..., stop:, stop:] @ (below @ corner)).neg_()


def conditional_importance(factor: Tensor, order: Tensor) -> Tensor:
    """1 / U_jj^2 per input, [..., in] in original order: the cost of a squared error at j under feedback.

    It is what remains of H_jj once the columns visited after j may move to make up for it, and so
    the weight with which the error of column j enters the sum that error feedback minimises.
    """
    return factor.diagonal(dim1=-2, dim2=-1).square().reciprocal().gather(-1, order.argsort(-1))


def feedback_cost(moment: Tensor, shrinkage: float, damping: float, falling: bool = True) -> Tensor:
    """What a unit squared rounding error at each place costs once feedback has spread it, [n] in order of index.

    With the factor U of the shrunken and damped moment S, an error r at place i becomes D = r U_i / U_ii, which
    costs D M D^T: the D of L D L^T if nothing is shrunken (QuIP: 2-Bit Quantization of Large Language Models With
    Guarantees, 2023). S is (1 - shrinkage) M plus a diagonal, and U S U^T = I, so no product with M is needed.
    moment: [n, n], or a diagonal [n] that no feedback goes through.
    """
    if moment.ndim == 1:
        return moment
    order = falling_order(moment) if falling else torch.arange(len(moment))
    moment = permute(moment, order)
    shrunken, own = shrink(moment, shrinkage), (1 - shrinkage) * diagonal(moment)
    factor, used = inverse_factor(shrunken, damping)
    added = diagonal(damp(shrunken, used)) - own
    squares = factor.square_()
    spread = (1 - squares @ added).clamp(min=0) / (1 - shrinkage) / squares.diagonal()
    return torch.empty_like(spread).index_copy_(0, order, spread)


def falling_order(moment: Tensor) -> Tensor:
    """Indices [..., n] that sort the diagonal from large to small; ties keep their order."""
    return diagonal(moment).argsort(dim=-1, descending=True, stable=True)


def permute(moment: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of [..., n, n] taken in `order` [..., n]."""
    rows = moment.gather(-2, order[..., :, None].expand_as(moment))
    return rows.gather(-1, order[..., None, :].expand_as(moment))


def take_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Columns of [..., m, n] taken in `order` [..., n]."""
    return matrix.gather(-1, order[..., None, :].expand_as(matrix))


def take_rows(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows of [..., m, n] taken in `order` [..., m]."""
    return matrix.gather(-2, order[..., :, None].expand_as(matrix))


def damage(difference: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> Tensor:
    """1/2 tr(G D H D^T), [...]: nats per token if G holds gradients of the loss in nats; G None: identity."""
    through = difference @ inputs
    if outputs is not None:
        through = outputs @ through
    return total(through * difference) / 2


def total(matrix: Tensor) -> Tensor:
    """Sums [...] of [..., m, n]: rows, then what they give on one thread, since torch divides a long sum by threads."""
    rows = matrix.sum(-1)
    with threads_for(0):
        return rows.sum(-1)
