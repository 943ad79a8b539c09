"""Floats whose group scales are powers of two, error feedback through H."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods import menus
from assay.methods.base import Statistics
from assay.methods.grid.base import Affine, in_groups
from assay.methods.grid.formats import FLOATS, grid_of, packed
from assay.methods.grid.scales import ceil_e8m0
from assay.methods.solve.gptq import FixedGrid
from assay.methods.solve.ordered import Order
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class ZeroQuantFp:
    """Floats whose group scales are powers of two, error feedback through H.

    M1 of the paper: the scale that covers a group, rounded up, so that FP4 becomes FP8 by adding exponents. Its M2 (ratios
    of scales that are powers of two) and its FP8 activations aren't here; its low-rank product is `lorc`.
    """

    verb: ClassVar[str] = "encode"
    needs: ClassVar[tuple[str, ...]] = ("H",)
    prices: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization (2023), its M1"
    formats: ClassVar[tuple[str, ...]] = ("fp",)

    def levels(self, columns: int) -> list[Level]:
        """Those of 4 bits, which such scales are meant for."""
        return [x for x in menus.of_format("fp", columns) if x.bits == 4]

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """See `Encoder.encode`."""
        order, grid = Order.of(weight, stats.h), grid_of(level, scale_dtype)
        largest = in_groups(weight, level.groups(weight.shape[-1])).abs().amax(-1)
        scale = ceil_e8m0(largest / FLOATS[int(level.bits)][-1], scale_dtype)
        affine = Affine(scale, torch.zeros_like(scale, dtype=torch.uint8))
        quantizer = FixedGrid(grid, affine, order.visit)
        order.feed(weight, quantizer)
        codes = order.restored(quantizer.codes.mT)
        return [packed(level, grid, c, s, z) for c, s, z in zip(codes, *affine, strict=True)]


METHOD = ZeroQuantFp
