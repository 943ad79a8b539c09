"""A weight in one of ggml's block formats, byte for byte as a GGUF file stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.model import ggml
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import Tunable


@dataclass(frozen=True)
class PackedBlocks:
    """Rows of blocks.

    kind: the type's name in ggml in lower case, see `ggml.KINDS`; rows: uint8 [out, bytes per row]; shape: (out, in).
    Raises InputError where the bytes are not those of such a weight.
    """

    kind: str
    rows: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        wanted = (self.shape[0], Level.parse(self.kind).nbytes(1, self.shape[1]))
        if self.rows.dtype != torch.uint8 or tuple(self.rows.shape) != wanted:
            raise InputError(
                f"{self.kind} of shape {self.shape} is uint8 {wanted}, not {self.rows.dtype} {tuple(self.rows.shape)}"
            )

    @classmethod
    def of(cls, kind: str, parts: ggml.Parts) -> PackedBlocks:
        """From what the blocks of a weight [out, in] hold."""
        rows = ggml.pack(kind, parts)
        return cls(kind, rows, (len(rows), ggml.KINDS[kind].columns(rows.shape[1])))

    @property
    def level(self) -> Level:
        return Level.parse(self.kind)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def parts(self) -> ggml.Parts:
        """Scales, codes and signs."""
        return ggml.unpack(self.kind, self.rows)

    def decode(self) -> Tensor:
        """Weight [out, in], float32, as ggml's own reader makes it."""
        return ggml.values(self.kind, self.parts())

    def tunable(self) -> Tunable | None:
        """See `TunablePacked`; scales [out, blocks, 1], or [out, blocks, 2] with minima, where they are fp16."""
        parts = self.parts()
        if self.kind in ("f16", "bf16", "mxfp4"):
            return None
        one, none = torch.ones_like(parts.d), torch.zeros_like(parts.d)
        alone = [parts._replace(d=one, m=None if parts.m is None else none)]
        alone += [] if parts.m is None else [parts._replace(d=none, m=one)]
        shares = torch.stack([ggml.values(self.kind, p).unflatten(1, (parts.d.shape[1], -1)) for p in alone], -1)
        numbers = torch.stack([parts.d] if parts.m is None else [parts.d, parts.m], -1)
        return Tunable(numbers, numbers, lambda x: (shares * x[..., None, :]).sum(-1).flatten(1), torch.float16)

    def with_numbers(self, numbers: Tensor) -> PackedBlocks:
        """See `TunablePacked`."""
        d, *m = numbers.unbind(-1)
        return replace(self, rows=ggml.pack(self.kind, self.parts()._replace(d=d, m=m[0] if m else None)))

    def tensors(self) -> dict[str, Tensor]:
        return {"weight_packed": self.rows.contiguous()}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], level: Level) -> PackedBlocks:
        """Inverse of `tensors`."""
        rows = stored["weight_packed"]
        return cls(level.format, rows, (len(rows), ggml.KINDS[level.format].columns(rows.shape[1])))
