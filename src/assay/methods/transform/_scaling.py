"""Scales of input channels: which matrices share them, what takes their inverse, and what rounding costs under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from assay.measure.damage import Curvature, diagonal
from assay.methods.grid.integer import IntegerGrid
from assay.methods.transform._subject import Subject
from assay.methods.transform.norm_fold import gain_of
from assay.model.errors import InputError
from assay.model.level import FORMATS, Level
from assay.model.progress import Progress
from assay.model.streams import Inner, Linear, Norm
from assay.model.weights import Edits, Weights

FLOOR = 1e-4


@dataclass(frozen=True)
class Rounding:
    """Round to nearest on groups of inputs, as a score sees it.

    rank: of a product that is taken from the matrix first and kept in floating point; rows: of a matrix with more rows,
    so many evenly spaced ones stand for all. Raises InputError for bits and groups that integers don't have.
    """

    bits: int
    group_size: int
    dtype: torch.dtype = torch.float32
    rank: int = 0
    rows: int = 512

    def __post_init__(self) -> None:
        Level(self.bits, self.group_size)  # refuses bits that integers don't have
        sizes = [size for size in FORMATS["int"].group_sizes if size is not None]
        if self.group_size not in sizes:
            raise InputError(f"group_size={self.group_size}: choose {', '.join(map(str, sizes))}")

    def grid(self, columns: int) -> IntegerGrid:
        """The grid for rows of `columns` weights: the asked group size, else the next that divides them."""
        sizes = (self.group_size, 64, 32)
        size = next((g for g in sizes if g <= self.group_size and columns % g == 0), None)
        return IntegerGrid(self.bits, size, symmetric=False, scale_dtype=self.dtype)

    def damage(self, matrices: Sequence[tuple[Tensor, Curvature]], scale: Tensor) -> float:
        """Nats per token that rounding costs when the columns are multiplied by `scale` [in] first.

        matrices: weights [out, in], float32, with their curvature.
        """
        total = 0.0
        for weight, curvature in matrices:
            grid = self.grid(weight.shape[1])
            scaled = (weight * scale).to(self.dtype).float()
            kept = _strongest(scaled, self.rank) if self.rank else torch.zeros(())
            affine = grid.fit(scaled - kept)
            decoded = grid.decode(grid.encode(scaled - kept, affine), affine).float() + kept
            total += curvature.damage(decoded / scale - weight)
        return total

    def sampled(self, weight: Tensor, curvature: Curvature) -> tuple[Tensor, Curvature]:
        """A matrix and its curvature, or some evenly spaced rows of both with a share raised to stand for all."""
        if len(weight) <= self.rows:
            return weight, curvature
        picked = torch.linspace(0, len(weight) - 1, self.rows).round().long()
        g = curvature.g[picked] if curvature.g.ndim == 1 else curvature.g[picked][:, picked]
        raised = curvature.share * float(diagonal(curvature.g).sum() / diagonal(g).sum().clamp_min(1e-30))
        return weight[picked], Curvature(curvature.h, g, raised, curvature.tokens)


def _strongest(matrix: Tensor, rank: int) -> Tensor:
    """A product of this rank near the best for a matrix [out, in]: its part in a subspace found by power iteration."""
    start = torch.randn(matrix.shape[1], min(rank, *matrix.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
    return basis @ (basis.mT @ matrix)


@dataclass(frozen=True)
class Group:
    """Matrices whose input channels can be multiplied by scales, since what writes them can be divided.

    Exactly one of norm and inner is set.
    """

    block: int
    readers: tuple[Linear, ...]
    norm: Norm | None = None
    inner: Inner | None = None

    def matrices(
        self, weights: Weights, statistics: Mapping[str, Curvature], rounding: Rounding
    ) -> list[tuple[Tensor, Curvature]]:
        """Weights and curvatures of those readers that are sites and that a token met."""
        found, name, tensor = [], "", torch.empty(0)
        for reader in self.readers:
            curvature = statistics.get(reader.site.name) if reader.site is not None else None
            if curvature is None or not curvature.tokens:
                continue
            if reader.inputs.tensor != name:
                name, tensor = reader.inputs.tensor, weights.read(reader.inputs.tensor)
            found.append(rounding.sampled(reader.matrix(tensor).float().contiguous(), curvature))
        return found

    def shared(self, values: Tensor, largest: bool = False) -> Tensor:
        """Values by input channel [in] made equal over the channels that are written once and read several times."""
        if self.inner is None or self.inner.heads[1] == 1:
            return values
        each = self.inner.gathered(values)
        return self.inner.spread(each.amax(0) if largest else each.mean(0))

    def fold(self, weights: Weights, scale: Tensor, edits: Edits) -> None:
        """Multiply the readers' columns by `scale` [in] and divide what writes them."""
        if self.norm is not None:
            scale = _into_norm(self.norm, weights, scale, edits)
        elif self.inner is not None:
            own = self.inner.gathered(scale)[0]
            edits.add(self.inner.divided, lambda rows: rows / own)
        edits.add((reader.inputs for reader in self.readers), lambda columns: columns * scale)


def groups(subject: Subject) -> Iterator[Group]:
    """Every group of a model, block by block."""
    residual = subject.streams.residual
    norms = [norm for norm in residual.norms if norm.block is not None] if residual else []
    found = [Group(norm.block, norm.readers, norm=norm) for norm in norms if norm.block is not None]
    found += [Group(stream.block, stream.readers, inner=stream) for stream in subject.streams.inner if stream.divided]
    yield from sorted(found, key=lambda group: group.block)


class Found(NamedTuple):
    """Which of the trials was best, its scales [in], and the damage of every trial; the first one changes nothing."""

    place: int
    scale: Tensor
    damages: tuple[float, ...]


def cheapest(matrices: Sequence[tuple[Tensor, Curvature]], trials: Sequence[Tensor], rounding: Rounding) -> Found:
    """The scales of `trials` that make rounding cheapest, of matrices [out, in] that share an input."""
    damages = tuple(rounding.damage(matrices, scale) for scale in trials)
    place = damages.index(min(damages))
    return Found(place, trials[place], damages)


def scaled_best(
    subject: Subject, name: str, rounding: Rounding, progress: Progress,
    search: Callable[[Group, Sequence[tuple[Tensor, Curvature]], Rounding], Found],
) -> Subject:  # fmt: skip
    """The subject with the scales that `search` finds folded into each group. Raises InputError where there are no groups."""
    wanted = list(groups(subject))
    if not wanted:
        raise InputError(f"{name}: {subject.streams.family} has no channels whose scale can be folded")
    edits, before, after, used = Edits(), 0.0, 0.0, 0
    with progress.task("searching scales", len(wanted)) as advance:
        for group in wanted:
            stored = replace(rounding, dtype=subject.weights.source.dtype(group.readers[0].inputs.tensor))
            matrices = group.matrices(subject.weights, subject.measured()(group.block), stored)
            if matrices:
                found = search(group, matrices, stored)
                before, after = before + found.damages[0], after + min(found.damages)
                if found.place:
                    used += 1
                    group.fold(subject.weights, found.scale, edits)
            advance()
    note = f"{used} of {len(wanted)} groups scaled; predicted damage of rounding them {before:.5f} -> {after:.5f} nats/token"
    return replace(subject, weights=subject.weights.edited(edits.by_tensor())).noting(note)


def mean_square(matrices: Sequence[tuple[Tensor, Curvature]]) -> Tensor:
    """Mean square of each input channel [in] over the matrices that read it, weighted by the tokens that meet them."""
    weights = [curvature.share for _, curvature in matrices]
    return sum((diagonal(c.h) * w for (_, c), w in zip(matrices, weights, strict=True)), torch.zeros(1)) / sum(weights)


def centred(scale: Tensor) -> Tensor:
    """`scale` with its largest and smallest entry around 1: rounding doesn't mind a common factor."""
    return scale / (scale.max() * scale.min()).sqrt()


def _into_norm(norm: Norm, weights: Weights, scale: Tensor, edits: Edits) -> Tensor:
    """Divide a norm's gains and biases by `scale`; returns what they were divided by in truth.

    A stored gain is rounded, and every weight that reads the channel would be off by that. So the readers are
    multiplied by the old gain over the new one as it is stored.
    """
    gain = gain_of(norm, weights)
    if norm.weight:
        dtype = weights.source.dtype(weights.origin(norm.weight))
        stored = (gain / scale - norm.offset).to(dtype).to(gain.dtype)
        new = stored + norm.offset
        scale = torch.where((new == 0) | (gain == 0), scale, gain / new)
        edits.whole(norm.weight, lambda _: stored.clone())
    if norm.bias:
        edits.whole(norm.bias, lambda bias: bias / scale)
    return scale
