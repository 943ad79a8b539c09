"""One sign for most weights, eight bits for those that would be missed most, error feedback through H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.solve.binary import salient_and_signs
from assay.methods.solve.ordered import Order
from assay.methods.split.scores import sensitivity, split
from assay.model.binary import PackedSalient
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class PbLlm:
    """One sign for most weights, eight bits for those that would be missed most, error feedback through H.

    The bits of a level are those that the paper quotes; where the salient weights lie costs one bit a weight more.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "PB-LLM: Partially Binarized Large Language Models (2023)"
    formats: ClassVar[tuple[str, ...]] = ("salient",)

    def levels(self, columns: int) -> list[Level]:
        """5 to 30% of the weights in eight bits."""
        return menus.of_format("salient", columns)

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`. Without H the largest weights are salient."""
        order = Order.of(weight, stats.h)
        salient = split(sensitivity(weight, order.importance), level.salient(*weight.shape[1:]))
        found = salient_and_signs(weight, salient, order, level.group_size, scale_dtype)
        parts = zip(salient, found.signs & ~salient, found.codes, *found.grid, *found.affine, strict=True)
        return [
            PackedSalient(level, mask, signs, mean, distance, codes[mask], scale[:, 0], zero[:, 0])
            for mask, signs, codes, mean, distance, scale, zero in parts
        ]


METHOD = PbLlm
