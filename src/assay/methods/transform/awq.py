"""Scales of the input channels, one exponent searched per group of matrices that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from assay.measure.damage import Curvature
from assay.methods.transform._scaling import FLOOR, Rounding, centred, groups, mean_square
from assay.methods.transform._subject import Subject
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.weights import Edits

EXPONENTS = tuple(i / 20 for i in range(20))


class Found(NamedTuple):
    """The best exponent, its scales [in], and the damage under every exponent tried."""

    exponent: float
    scale: Tensor
    damages: tuple[float, ...]


@dataclass(frozen=True)
class Awq:
    """Scales of the input channels that make rounding to nearest cheapest, folded into what writes the channels.

    s = m^alpha with m the root mean square of the channel (the paper takes the mean of |x|, which H doesn't hold),
    alpha the cheapest of 0, 0.05 .. 0.95 by predicted damage at `bits` in groups of `group_size`. Alpha 0 changes
    nothing. Folded from norms, from the linear half of a gated MLP (or a ReLU), and from values, where query heads
    that share a value head share its scales.
    """

    bits: int = 4
    group_size: int = 64
    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    paper: ClassVar[str] = "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (2023)"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        wanted = list(groups(subject))
        if not wanted:
            raise InputError(f"awq: {subject.streams.family} has no channels whose scale can be folded")
        edits, before, after, used = Edits(), 0.0, 0.0, 0
        with progress.task("searching scales", len(wanted)) as advance:
            for group in wanted:
                rounding = Rounding(self.bits, self.group_size, subject.weights.source.dtype(group.readers[0].inputs.tensor))
                matrices = group.matrices(subject.weights, subject.measured()(group.block), rounding)
                if matrices:
                    found = search(matrices, group.shared(mean_square(matrices)).sqrt(), rounding)
                    before, after = before + found.damages[0], after + min(found.damages)
                    if found.exponent:
                        used += 1
                        group.fold(subject.weights, found.scale, edits)
                advance()
        note = f"{used} of {len(wanted)} groups scaled; predicted damage of rounding them {before:.5f} -> {after:.5f} nats/token"
        return replace(subject, weights=subject.weights.edited(edits.by_tensor())).noting(note)


def scales(size: Tensor, exponent: float) -> Tensor:
    """Scales [in] from the sizes of the inputs [in]; exponent 0 gives ones."""
    return centred(size.pow(exponent).clamp_min(FLOOR))


def search(
    matrices: Sequence[tuple[Tensor, Curvature]], size: Tensor, rounding: Rounding, exponents: Sequence[float] = EXPONENTS
) -> Found:
    """The exponent whose scales make rounding cheapest.

    matrices: weights [out, in], float32, that share an input, with their curvature; size: [in].
    """
    trials = [scales(size, exponent) for exponent in exponents]
    damages = tuple(rounding.damage(matrices, scale) for scale in trials)
    best = damages.index(min(damages))
    return Found(exponents[best], trials[best], damages)


METHOD = Awq
