"""Scales of the input channels, one exponent for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.transform._scaling import Group, Rounding, centred, groups, mean_square
from assay.methods.transform._subject import Subject
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.weights import Edits

STRENGTHS = tuple(i / 20 for i in range(21))
FLOOR = 1e-5


@dataclass(frozen=True)
class SmoothQuantPlus:
    """Scales of the input channels from the sizes of inputs and weights, one strength for the whole model.

    s = m^alpha / max|w|^(1 - alpha) with m the root mean square of the channel (the paper takes the maximum of |x|,
    which H doesn't hold), alpha the one of 0, 0.05 .. 1 with the least predicted damage over the whole model at
    `bits` in groups of `group_size` (the paper measures the outputs). No alpha gives s = 1, so that is tried as well.
    """

    bits: int = 4
    group_size: int = 64
    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    paper: ClassVar[str] = "SmoothQuant+: Accurate and Efficient 4-bit Post-Training WeightQuantization for LLM (2023)"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        wanted = list(groups(subject))
        if not wanted:
            raise InputError(f"smooth_quant_plus: {subject.streams.family} has no channels whose scale can be folded")
        totals = [0.0] * (1 + len(STRENGTHS))
        kept: list[tuple[Group, Tensor, Tensor]] = []
        with progress.task("searching one strength", len(wanted)) as advance:
            for group in wanted:
                rounding = Rounding(self.bits, self.group_size, subject.weights.source.dtype(group.readers[0].inputs.tensor))
                matrices = group.matrices(subject.weights, subject.measured()(group.block), rounding)
                if matrices:
                    inputs = group.shared(mean_square(matrices)).sqrt()
                    largest = group.shared(torch.stack([w.abs().amax(0) for w, _ in matrices]).amax(0), largest=True)
                    trials = [torch.ones_like(inputs), *(scales(inputs, largest, strength) for strength in STRENGTHS)]
                    totals = [t + rounding.damage(matrices, s) for t, s in zip(totals, trials, strict=True)]
                    kept.append((group, inputs, largest))
                advance()
        best = cheapest(totals)
        edits = Edits()
        for group, inputs, largest in kept if best is not None else ():
            group.fold(subject.weights, scales(inputs, largest, best or 0.0), edits)
        chosen = "no strength helps; nothing changed" if best is None else f"strength {best:g}"
        note = f"{chosen}; predicted damage of rounding {totals[0]:.5f} -> {min(totals):.5f} nats/token"
        return replace(subject, weights=subject.weights.edited(edits.by_tensor())).noting(note)


def scales(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """Scales [in] from the sizes of the inputs [in] and of the weights that read them [in]."""
    return centred((inputs.pow(strength) / weights.clamp_min(FLOOR).pow(1 - strength)).clamp_min(FLOOR))


def cheapest(totals: Sequence[float]) -> float | None:
    """The strength with the least damage; totals: without scales, then at each of STRENGTHS. None: without scales."""
    best = min(range(len(totals)), key=totals.__getitem__)
    return STRENGTHS[best - 1] if best else None


METHOD = SmoothQuantPlus
