"""Block floating point with channels sorted by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from assay.methods.cache._packing import EVERY, Packed, SortedChannels, check_bits
from assay.model.errors import InputError
from assay.runtime.codecs import BlockFloat as Blocks
from assay.runtime.codecs import Side


@dataclass(frozen=True)
class BlockFloat(Packed):
    """`bits` for each number and one exponent byte for each `block` channels; keys sorted by channel norm first.

    The order is that of the prompt's keys after RoPE, not of the weights' rows.
    """

    paper: ClassVar[str] = "Accurate Block Quantization in LLMs with Outliers (2024)"
    bits: int = 4
    block: int = 32
    residual: int = 32
    ordered: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.bits == 1:
            raise InputError("block floating point needs 2 bits or more")

    def sides(self, layer: int) -> tuple[Side, Side]:
        """See `Packer`."""
        codec = Blocks(self.bits, self.block)
        return Side((SortedChannels(),) if self.ordered else (), codec, self.residual, every=EVERY), Side(
            (), codec, self.residual, every=EVERY
        )


METHOD = BlockFloat
