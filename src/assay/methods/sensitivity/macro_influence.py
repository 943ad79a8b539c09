"""How much leaving a block out changes the last hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from assay.measure.variants import Variant, outputs
from assay.methods.sensitivity._hidden import cosines
from assay.methods.sensitivity._subject import Scores, Subject


@dataclass(frozen=True)
class MacroInfluence:
    """1 minus the cosine of the last block's outputs with and without a block."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("model",)
    paper: ClassVar[str] = "FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers (2024)"
    prices: ClassVar[bool] = False
    samples: ClassVar[str] = "windows"
    whole_blocks: ClassVar[bool] = True

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Between 0 and 2; the last norm is left out of it."""
        ids, blocks = subject.ids, range(len(subject.model.blocks))
        without = [Variant(block, None) for block in blocks]
        with outputs(subject.model, ids, without, subject.progress) as found:
            rows = [
                torch.cat([1 - cosines(found.original(w), found.variant(block, w)) for w in range(len(ids))])
                for block in blocks
            ]  # fmt: skip
        return subject.alike_in_blocks(torch.stack(rows))


METHOD = MacroInfluence
