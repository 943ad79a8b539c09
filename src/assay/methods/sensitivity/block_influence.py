"""How much a block changes its hidden states, from 0 for one that passes them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from assay.methods.sensitivity._hidden import cosines, states
from assay.methods.sensitivity._subject import Scores, Subject


@dataclass(frozen=True)
class BlockInfluence:
    """1 minus the cosine of what enters a block and what leaves it."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024)"
    prices: ClassVar[bool] = False
    samples: ClassVar[str] = "windows"
    whole_blocks: ClassVar[bool] = True

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`."""
        return subject.alike_in_blocks(torch.stack([1 - cosines(before, after) for before, after in states(subject)]))


METHOD = BlockInfluence
