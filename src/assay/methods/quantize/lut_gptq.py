"""A table of values per row by k-means, error feedback through H."""

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
from assay.methods.solve.kept import Kept
from assay.methods.solve.ordered import Order
from assay.methods.split.scores import deviation, split
from assay.model.level import Level
from assay.model.packed import Packed, PackedTable


@dataclass(frozen=True)
class LutGptq:
    """A table of values per row by k-means, error feedback through H.

    Importance in the k-means is what feedback leaves of an input's cost: the per-weight Fisher information of SqueezeLLM
    would need an H of its own for every row.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "SqueezeLLM (2023), its tables in the loop of GPTQ (2022)"
    formats: ClassVar[tuple[str, ...]] = ("lut",)

    def levels(self, columns: int) -> list[Level]:
        """Tables alone and with 0.5% of the weights exact."""
        tables = menus.of_format("lut", columns)
        return tables + menus.with_sparse(tables, 0.005)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        order = Order.of(weight, stats.h)
        mask = split(deviation(weight), level.kept(*weight.shape[1:]))
        importance = order.importance[:, None].expand(weight.shape).masked_fill(mask, 0)
        table = codebook.fit(weight, importance, 2 ** int(level.bits)).to(scale_dtype)
        inner = codebook.RowTables(table.float(), weight.shape[-1])
        quantizer = Kept(inner, order, mask, scale_dtype)
        order.feed(weight, quantizer)
        packed = map(partial(PackedTable, level.base, dtype=scale_dtype), order.restored(inner.codes.mT), table)
        return with_exact(level, packed, order.restored(quantizer.values.mT), mask, scale_dtype)


METHOD = LutGptq
