"""The price that plans are made from: Kronecker-factored Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from assay.methods.sensitivity._subject import Scores, Subject
from assay.model.errors import InputError


@dataclass(frozen=True)
class Kfac:
    """½ tr(G D H Dᵀ) of the rounding error D, as the profile priced it; more in the first block, as measured, see `Probes`."""

    verb: ClassVar[str] = "score"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    paper: ClassVar[str] = "Optimizing Neural Networks with Kronecker-factored Approximate Curvature (2015)"
    prices: ClassVar[bool] = True
    samples: ClassVar[str] = "parts of the text"
    whole_blocks: ClassVar[bool] = False

    def score(self, subject: Subject) -> Scores:
        """See `Sensitivity.score`. Nats per token; one sample for each part of the text."""
        index, found = subject.profile.index, {}
        count = max(map(len, index["spread"].values()), default=1)
        for row in index["rows"]:
            priced = subject.profile.prices.get(row["name"])
            if row["block"] is not None and priced is not None:
                parts = index["spread"].get(row["name"], [1.0] * count)
                level = subject.level_of(row["shape"][1]).name
                if level not in priced:
                    raise InputError(f"{subject.profile.folder} has no price of {row['name']} at {level}; measure again")
                price = priced[level]["nearest"] * (index["first"] if row["block"] == 0 else 1.0)
                found[row["name"]] = price * torch.tensor(parts, dtype=torch.float64)
        return found


METHOD = Kfac
