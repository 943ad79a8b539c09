"""Keys by channel, values by token, the latest exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from assay.methods.cache._packing import EVERY, Packed, check_bits, check_residual
from assay.runtime.codecs import PerChannel, PerToken, Side


@dataclass(frozen=True)
class Kivi(Packed):
    """Asymmetric integers: keys a scale for each channel of `group` tokens, values for `group` channels of a token.

    Keys are written `residual` at a time, values, eight at a time, when `residual` later
    ones are there; what is written never changes.
    """

    paper: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024)"
    bits: int = 2
    group: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_residual(self.residual, self.group)

    def sides(self, layer: int) -> tuple[Side, Side]:
        """See `Packer`."""
        return (
            Side((), PerChannel(self.bits, self.group), 0, self.residual),
            Side((), PerToken(self.bits, self.group), self.residual, every=EVERY),
        )


METHOD = Kivi
