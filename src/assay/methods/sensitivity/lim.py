"""How much a block changes the direction of its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from assay.methods.sensitivity._hidden import cosines, states
from assay.methods.sensitivity._subject import Scores, Subject


@dataclass(frozen=True)
class LIM:
    """Minus the cosine of what enters a block and what leaves it."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "Layer-Wise Quantization: Quantizing LLMs Based on Layer Importance (2024), LIM"
    prices: ClassVar[bool] = False
    samples: ClassVar[str] = "windows"
    whole_blocks: ClassVar[bool] = True

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`."""
        return subject.alike_in_blocks(torch.stack([-cosines(before, after) for before, after in states(subject)]))


METHOD = LIM
