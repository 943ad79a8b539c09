"""The values of each attention head in another orthonormal basis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.transform._orthogonal import rotation
from assay.methods.transform._subject import Subject
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.weights import Edits


@dataclass(frozen=True)
class RotateHeads:
    """The values of each head turned by a Hadamard matrix with random signs of its own.

    Attention mixes tokens, not channels, so what turns the rows of the value matrix is undone in the columns of the
    output matrix. Query heads that share a value head share its rotation. Queries and keys stay: a rotary embedding
    lies between them.
    """

    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (2024), stage 1b"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        streams = [stream for stream in subject.streams.inner if stream.kind == "values"]
        if not streams:
            raise InputError(f"rotate_heads: {subject.streams.family} has no attention values")
        edits = Edits()
        for stream in streams:
            own, each = stream.heads
            width = subject.weights.width(stream.written[0])
            turns = torch.stack([rotation(width // own, generator) for _ in range(own)])
            edits.add(stream.written, lambda part, turns=turns: by_head(part, turns))  # type: ignore[misc]
            shared = turns.repeat_interleave(each, 0)
            edits.add((r.inputs for r in stream.readers), lambda part, turns=shared: by_head(part, turns))  # type: ignore[misc]
        return replace(subject, weights=subject.weights.edited(edits.by_tensor()))


def by_head(part: Tensor, turns: Tensor) -> Tensor:
    """[..., heads * size] times one matrix per head, turns [heads, size, size]."""
    heads, size, _ = turns.shape
    split = part.unflatten(-1, (heads, size))
    return torch.einsum("...hi,hij->...hj", split.double(), turns.double()).to(part.dtype).flatten(-2)


METHOD = RotateHeads
