"""Fewer key channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from assay.methods.cache._packing import KeptChannels, Packed
from assay.model.errors import InputError
from assay.runtime.codecs import Side


@dataclass(frozen=True)
class ThinK(Packed):
    """Drops the share `thin` of each head's key channels of the prompt; its last `window` tokens and later ones keep all."""

    paper: ClassVar[str] = "ThinK: Thinner Key Cache by Query-Driven Pruning (2024)"
    stage: ClassVar[int] = 1
    thin: float = 0.4
    window: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.thin < 1:
            raise InputError(f"thin={self.thin:g}; give the share of key channels to drop, from 0 to below 1")

    def sides(self, layer: int) -> tuple[Side | None, None]:
        """See `Packer`."""
        return (Side((KeptChannels(1 - self.thin, self.window),), None, self.window, running=False) if self.thin else None), None


METHOD = ThinK
