"""Vector codebooks by weighted k-means, and error feedback with them (VPTQ: Vector Post-Training Quantization, 2024)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from assay.methods.solve.kept import Kept
from assay.methods.solve.ordered import Order
from assay.model.vectors import cut

SAMPLES = 64
"""Vectors per centroid that a codebook is fitted to, at most."""
AT_ONCE = 1 << 16


class Frame(NamedTuple):
    """Every column's smallest value and its range, [batch, in] each, as stored: codebooks are for (w - low) / span."""

    low: Tensor
    span: Tensor

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> "Frame":
        """For weight [batch, out, in]; a column of equal weights has the span 1."""
        low, high = weight.amin(-2), weight.amax(-2)
        span = torch.where(high > low, high - low, torch.ones_like(low))
        return cls(low.to(dtype), span.to(dtype))


def k_means(vectors: Tensor, importance: Tensor, size: int, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """Centroids [size, v] for vectors [n, v], squared distances weighted by importance [n].

    From k-means++ (Arthur and Vassilvitskii, 2007) with a fixed seed, until the objective falls by less than `tolerance` of it.
    """
    step = max(1, len(vectors) // (SAMPLES * size))
    # shuffled first: a step that shares factors with the vectors of a column would only meet the same few outputs
    drawn = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[::step]
    points, price = vectors[drawn].float(), importance[drawn].float()
    price = torch.where(price.sum() > 0, price, torch.ones_like(price))
    table = _start(points, price, size)
    before = float("inf")
    for _ in range(iterations):
        table, objective = improve(points, price, table)
        if before - objective <= tolerance * objective:
            break
        before = objective
    return table


def improve(vectors: Tensor, importance: Tensor, table: Tensor) -> tuple[Tensor, float]:
    """One of Lloyd's iterations: the better table, and the objective of the one given. Empty clusters stay."""
    codes = nearest(vectors, table)
    objective = float((importance * (vectors - table[codes]).square().sum(-1)).double().sum())
    held = torch.zeros(len(table)).index_add_(0, codes, importance)
    sums = torch.zeros_like(table).index_add_(0, codes, importance[:, None] * vectors)
    return torch.where(held[:, None] > 0, sums / held[:, None].clamp_min(1e-30), table), objective


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """Index (int64) of the nearest entry of a table [size, v] for each vector [n, v]."""
    half = table.square().sum(-1) / 2
    return torch.cat([(half - part @ table.T).argmin(-1) for part in vectors.split(AT_ONCE)])


def _start(points: Tensor, price: Tensor, size: int) -> Tensor:
    """Points drawn one after another, in proportion to what they still cost."""
    draws = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost, chosen = price.double(), []
    for draw in draws:
        sums = cost.cumsum(0)
        at = int(torch.searchsorted(sums, draw * sums[-1]).clamp(max=len(points) - 1))
        chosen.append(points[at])
        away = price.double() * (points - points[at]).square().sum(-1)
        cost = away if len(chosen) == 1 else torch.minimum(cost, away)
    return torch.stack(chosen)


class VectorQuantizer:
    """Column quantizer: each run of v rows of a column becomes low + span * the sum of one entry of every codebook.

    tables: [batch, size, v] of each stage, nearest entries chosen one stage after the other.
    """

    def __init__(self, order: Order, frame: Frame, tables: Sequence[Tensor], rows: int) -> None:
        vectors = -(-rows // tables[0].shape[-1])
        shape = (len(order.visit), order.visit.shape[-1], vectors)
        self.low, self.span = (p.float().gather(-1, order.visit) for p in frame)
        self.tables, self.dtype, self.rows = [t.float() for t in tables], frame.low.dtype, rows
        self.codes = [torch.empty(shape, dtype=torch.uint8) for _ in tables]
        self.left = torch.empty(*shape, tables[0].shape[-1])

    def __call__(self, column: int, values: Tensor) -> Tensor:
        low, span = self.low[:, column, None], self.span[:, column, None]
        left = cut((values - low) / span, self.left.shape[-1])
        vectors = left
        for table, codes in zip(self.tables, self.codes, strict=True):
            found = (table.square().sum(-1)[:, None] / 2 - left @ table.mT).argmin(-1)
            codes[:, column] = found
            left = left - table.gather(1, found[..., None].expand(left.shape))
        self.left[:, column] = left
        return (low + span * (vectors - left).flatten(1)[:, : self.rows]).to(self.dtype).float()


class Coded(NamedTuple):
    """What `solve` found: indices uint8 [batch, in, vectors] and tables [batch, size, v] of each stage, and the frame.

    values: [batch, out, in], what each weight was at its turn.
    """

    codes: list[Tensor]
    tables: list[Tensor]
    frame: Frame
    values: Tensor


def solve(
    weight: Tensor, order: Order, widths: Sequence[int], length: int, dtype: torch.dtype, kept: Tensor | None = None
) -> Coded:
    """Codebooks of 2^width vectors of `length` rows for weight [batch, out, in], a stage for each width, and their codes.

    The first codebook is fitted to the weights, each further one to what the columns, at their turn, had left.
    A squared error counts by what feedback leaves of its cost, in units of the column's span.
    kept: bool [batch, out, in], weights that are stored as they are at their turn.
    """
    mask = torch.zeros(weight.shape, dtype=torch.bool) if kept is None else kept
    frame = Frame.of(weight, dtype)
    scaled = ((weight - frame.low.float()[:, None]) / frame.span.float()[:, None]).mT
    targets = cut(scaled, length)
    importance = order.importance.masked_fill(mask.all(-2), 0)
    price = (importance * frame.span.float().square())[..., None].expand(targets.shape[:-1])
    tables: list[Tensor] = []
    for width in widths:
        fitted = [k_means(t.flatten(0, 1), p.flatten(), 2**width) for t, p in zip(targets, price, strict=True)]
        tables.append(torch.stack(fitted).to(dtype))
        quantizer = VectorQuantizer(order, frame, tables, weight.shape[1])
        feed = Kept(quantizer, order, mask, dtype)
        order.feed(weight, feed)
        back = order.visit.argsort(-1)
        targets = torch.stack([left[b] for left, b in zip(quantizer.left, back, strict=True)])
    codes = [torch.stack([c[b] for c, b in zip(stage, back, strict=True)]) for stage in quantizer.codes]
    return Coded(codes, tables, frame, order.restored(feed.values.mT))
