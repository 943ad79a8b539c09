"""The diagonal of the Fisher matrix, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from assay.methods.sensitivity._subject import Scores, Subject
from assay.model.errors import InputError


@dataclass(frozen=True)
class FisherDiagonal:
    """½ Σ F_ij d_ij² of the rounding error d, F the mean squared gradient."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("fisher", "model")
    paper: ClassVar[str] = "SqueezeLLM: Dense-and-Sparse Quantization (2023), its diagonal Fisher information"
    prices: ClassVar[bool] = True
    samples: ClassVar[str] = ""
    whole_blocks: ClassVar[bool] = False

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Nats per token."""
        if "fisher" not in subject.profile.index["settings"]["weightwise"]:
            raise InputError(f"{subject.profile.folder} holds no fisher; run assay profile with --method squeezellm")
        found = {}
        for block in range(len(subject.model.blocks)):
            curvatures = subject.profile.curvatures(block, ("fisher",))
            for site in subject.model.anatomy.block_sites(block):
                weight, fisher = subject.weight(site), curvatures[site.name].fisher
                assert fisher is not None, "the index says that it was measured"
                cost = 0.5 * (fisher.double() * (subject.rounded(weight) - weight).square()).sum()
                found[site.name] = cost[None] if torch.is_tensor(cost) else torch.tensor([cost])
        return found


METHOD = FisherDiagonal
