"""Outliers kept exactly, the rest rounded with the scale that fits it best; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._scalar import pack
from assay.methods.quantize._sum import with_exact
from assay.methods.solve import scale_fit
from assay.methods.split.scores import deviation, split
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class EasyQuant:
    """Outliers kept exactly, the rest rounded with the scale that fits it best; no data.

    Codes are those of integer levels, -2^(b-1) to 2^(b-1) - 1, and scales start at absmax / (2^(b-1) - 1/2), where the
    paper's range is symmetric.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ()
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs (2023)"
    formats: ClassVar[tuple[str, ...]] = ("int",)

    def levels(self, columns: int) -> list[Level]:
        """Symmetric integers, 0.5% of the weights exact: of Gaussian weights 0.3% lie beyond 3 standard deviations."""
        return menus.with_sparse(menus.symmetric(columns), 0.005)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        mask = split(deviation(weight), level.kept(*weight.shape[1:]))
        codes = pack(scale_fit.solve, weight.masked_fill(mask, 0), level.base, scale_dtype, None, None)
        return with_exact(level, codes, weight, mask, scale_dtype)


METHOD = EasyQuant
