"""Gains and biases of norms moved into the matrices that read them; the norms are left with gain one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.transform._subject import Subject
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.model.streams import Linear, Norm
from assay.model.weights import Edits, Weights


@dataclass(frozen=True)
class NormFold:
    """Gains and biases of norms moved into the matrices that read them.

    W (gain · n + bias) + b = (W gain) n + (b + W bias). Where a reader has no bias, the norm keeps bias / gain.
    The final norm of a model with a tied head keeps its gains, so that the head can stay tied.
    """

    verb: ClassVar[str] = "transform"
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "SliceGPT: Compress Large Language Models by Deleting Rows and Columns (2024), section 3"

    def apply(self, subject: Subject, generator: torch.Generator, progress: Progress) -> Subject:
        """See `Transform.apply`."""
        residual = subject.streams.need_residual("norm_fold")
        folded = fold(subject)
        return (
            folded.noting(f"{residual.final.name} keeps its gains: the head is tied to the embedding")
            if residual.tied
            else folded
        )


def fold(subject: Subject) -> Subject:
    """Every norm that feeds matrices folded into them, but the final one of a tied head. Raises InputError."""
    residual = subject.streams.need_residual("norm_fold")
    edits = Edits()
    for norm in residual.norms[: -1 if residual.tied else None]:
        _fold(norm, subject.weights, edits)
    return replace(subject, weights=subject.weights.edited(edits.by_tensor()))


def gain_of(norm: Norm, weights: Weights) -> Tensor:
    """Gains of a norm [width]; ones where it has none."""
    if norm.weight:
        return weights.read(norm.weight) + norm.offset
    return torch.ones_like(weights.read(norm.bias or ""))


def _fold(norm: Norm, weights: Weights, edits: Edits) -> None:
    gain = gain_of(norm, weights)
    edits.add((reader.inputs for reader in norm.readers), lambda columns: columns * gain)
    if norm.weight:
        edits.whole(norm.weight, lambda stored: torch.full_like(stored, 1 - norm.offset))
    if not norm.bias:
        return
    shift = weights.read(norm.bias)
    if all(reader.bias for reader in norm.readers):
        for reader in norm.readers:
            _shift(reader, shift, weights, edits)
        edits.whole(norm.bias, torch.zeros_like)
        return
    if (shift[gain == 0] != 0).any():
        raise InputError(f"{norm.name} has gains of zero beside a bias, and readers without a bias to fold it into")
    edits.whole(norm.bias, lambda stored: torch.where(gain == 0, 0.0, stored / gain))


def _shift(reader: Linear, shift: Tensor, weights: Weights, edits: Edits) -> None:
    def add(bias: Tensor) -> Tensor:
        matrix = reader.matrix(weights.read(reader.inputs.tensor))
        return (bias + matrix.double() @ shift.double()).to(bias.dtype)

    edits.add([reader.bias] if reader.bias else [], add)


METHOD = NormFold
