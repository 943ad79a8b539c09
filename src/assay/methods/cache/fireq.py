"""Four bits with scales that RoPE leaves alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from assay.methods.cache._packing import EVERY, Packed, SmoothedPairs, check_bits
from assay.runtime.codecs import PerToken, Side


@dataclass(frozen=True)
class FireQ(Packed):
    """Integers for `group` channels of a token; keys smoothed by RoPE pair, the `outliers` largest channels one by one."""

    paper: ClassVar[str] = (
        "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration (2025), its cache"
    )
    bits: int = 4
    group: int = 32
    outliers: int = 8
    residual: int = 32

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def sides(self, layer: int) -> tuple[Side, Side]:
        """See `Packer`."""
        codec = PerToken(self.bits, self.group)
        return Side((SmoothedPairs(self.outliers),), codec, self.residual, every=EVERY), Side(
            (), codec, self.residual, every=EVERY
        )


METHOD = FireQ
