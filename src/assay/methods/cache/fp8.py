"""Eight-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from assay.methods.cache._packing import EVERY, Packed
from assay.runtime.codecs import Float8, Side


@dataclass(frozen=True)
class FP8(Packed):
    """E4M3 with a scale for each token and head; the latest `residual` tokens exact."""

    paper: ClassVar[str] = "FP8 Formats for Deep Learning (2022)"
    residual: int = 0

    def sides(self, layer: int) -> tuple[Side, Side]:
        """See `Packer`."""
        return Side((), Float8(), self.residual, every=EVERY), Side((), Float8(), self.residual, every=EVERY)


METHOD = FP8
