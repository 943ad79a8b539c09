"""Scales of the input channels for codes beside a low-rank product, searched per group of matrices that share an input."""

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

SHARES = tuple(i / 20 for i in range(1, 20))
EXPONENTS = ((0.0, 0.0), *((a, 0.0) for a in SHARES), *((a, 1 - a) for a in SHARES))


@dataclass(frozen=True)
class SvdSmooth:
    """Scales of the input channels that make codes beside a low-rank product cheapest, folded into what writes the channels.

    s = x^a / w^b with x the root mean square of the channel (the paper takes its largest value, which H doesn't hold) and w
    the largest weight that reads it; (a, b) the cheapest of 39 pairs by predicted damage, rounding to `bits` in
    groups of `group_size` what a product of `rank` leaves. The first pair, (0, 0), changes nothing.
    """

    bits: int = 4
    group_size: int = 64
    rank: int = 8
    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    paper: ClassVar[str] = "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models (2025), smoothing"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""

        def search(group: Group, matrices: Sequence[tuple[Tensor, Curvature]], rounding: Rounding) -> Found:
            size = group.shared(mean_square(matrices)).sqrt()
            reach = group.shared(torch.stack([w.abs().amax(0) for w, _ in matrices]).amax(0), largest=True)
            return cheapest(matrices, [scales(size, reach, a, b) for a, b in EXPONENTS], rounding)

        rounding = Rounding(self.bits, self.group_size, rank=self.rank)
        return scaled_best(subject, "svd_smooth", rounding, progress, search)


def scales(size: Tensor, reach: Tensor, a: float, b: float) -> Tensor:
    """size^a / reach^b, [in]; a = b = 0 gives ones."""
    return centred((size.pow(a) / reach.clamp_min(1e-12).pow(b)).clamp_min(FLOOR))


METHOD = SvdSmooth
