"""A low-rank product first, then the codes of what it leaves, by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import base, menus
from assay.methods.base import Statistics
from assay.methods.quantize._sum import with_factors
from assay.methods.solve import low_rank
from assay.methods.solve.curvature import damage, total
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class SvdQuant:
    """A low-rank product first, then the codes of what it leaves, by turns.

    base: the method for the rest; rank: of the levels offered; weighted: whether both are judged at the outputs
    (under H) or at the weights, as in the paper; turns: the most that are tried, the best one is kept.
    The paper's smoothing of the inputs is a transform of its own; under H the order of the inputs' sizes is known anyway.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H", "G")
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models (2025)"
    formats: ClassVar[tuple[str, ...]] = menus.SCALARS
    base: str = "gptq"
    rank: int = 8
    weighted: bool = True
    turns: int = 8

    def levels(self, columns: int) -> list[Level]:
        """Those of the base with the rank added."""
        return menus.with_rank(base.get(self.base)().levels(columns), self.rank)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        method = base.get(self.base)()
        if not level.rank:
            return method.encode(weight, level, scale_dtype, stats)
        metric = stats.h if self.weighted else None
        best: list[Packed] = []
        least = torch.full((len(weight),), torch.inf)
        decoded = torch.zeros_like(weight)
        for _ in range(self.turns):
            found = low_rank.factors(weight - decoded, level.rank, metric)
            stored = (found[0].to(scale_dtype), found[1].to(scale_dtype))
            rest = weight - stored[0].float() @ stored[1].float()
            codes = method.encode(rest, level.base, scale_dtype, stats)
            decoded = torch.stack([c.decode().float() for c in codes])
            loss = _loss(rest - decoded, metric)
            packed = with_factors(level, codes, stored)
            best = [new if better else old for new, old, better in zip(packed, best or packed, loss < least, strict=True)]
            if not bool((loss < least).any()):
                break
            least = torch.minimum(least, loss)
        return best


def _loss(difference: Tensor, H: Tensor | None) -> Tensor:
    """Squared error at the outputs, or of the weights, [batch]."""
    return total(difference.square()) if H is None else damage(difference, H)


METHOD = SvdQuant
