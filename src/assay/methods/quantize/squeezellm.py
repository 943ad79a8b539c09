"""A table of values per row by weighted k-means, beside sensitive weights and outliers kept exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.quantize._sum import with_exact
from assay.methods.solve import codebook
from assay.methods.split.scores import sensitive_or_large
from assay.model.level import Level
from assay.model.packed import Packed, PackedTable


@dataclass(frozen=True)
class SqueezeLLM:
    """A table of values per row by weighted k-means, beside sensitive weights and outliers kept exactly."""

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("fisher",)
    prices: ClassVar[str] = "nearest"
    paper: ClassVar[str] = "SqueezeLLM: Dense-and-Sparse Quantization (2023)"
    formats: ClassVar[tuple[str, ...]] = ("lut",)

    def levels(self, columns: int) -> list[Level]:
        """The paper's share of exact weights: 0.05% sensitive ones and 0.4% outliers."""
        return menus.with_sparse(menus.of_format("lut", columns), 0.0045)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`. Without Fisher information all weights count alike."""
        fisher = torch.ones_like(weight) if stats.fisher is None else stats.fisher
        mask = sensitive_or_large(weight, fisher, level.kept(*weight.shape[1:]))
        table = codebook.fit(weight, fisher.masked_fill(mask, 0), 2 ** int(level.bits)).to(scale_dtype)
        codes = codebook.nearest(weight, table.float())
        packed = map(partial(PackedTable, level.base, dtype=scale_dtype), codes, table)
        return with_exact(level, packed, weight, mask, scale_dtype)


METHOD = SqueezeLLM
