"""Scales of the input channels, one exponent searched per group of matrices that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.measure.damage import Curvature
from assay.methods.transform._scaling import FLOOR, Found, Group, Rounding, centred, cheapest, mean_square, scaled_best
from assay.methods.transform._subject import Subject
from assay.model.progress import Progress

EXPONENTS = tuple(i / 20 for i in range(20))


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

        def best(group: Group, matrices: Sequence[tuple[Tensor, Curvature]], rounding: Rounding) -> Found:
            return search(matrices, group.shared(mean_square(matrices)).sqrt(), rounding)

        return scaled_best(subject, "awq", Rounding(self.bits, self.group_size), progress, best)


def scales(size: Tensor, exponent: float) -> Tensor:
    """Scales [in] from the sizes of the inputs [in]; exponent 0 gives ones."""
    return centred(size.pow(exponent).clamp_min(FLOOR))


def search(matrices: Sequence[tuple[Tensor, Curvature]], size: Tensor, rounding: Rounding) -> Found:
    """The exponent whose scales make rounding cheapest, by its place in `EXPONENTS`.

    matrices: weights [out, in], float32, that share an input, with their curvature; size: [in].
    """
    return cheapest(matrices, [scales(size, exponent) for exponent in EXPONENTS], rounding)


METHOD = Awq
