"""Neurons that are exactly zero are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from assay.methods.activation._sparse import Gate, activations, gated
from assay.methods.activation.ppl_p import outputs
from assay.model.errors import InputError


class FatReLU(nn.Module):
    """x where it is at least `limit` and above 0, else 0."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return torch.where((x >= self.limit) & (x > 0), x, 0)


@dataclass(frozen=True, eq=False)
class ProSparse:
    """Runs a model with ReLU gates (see `assay.tune_relu`) on the neurons that are not zero: without loss at limit 0.

    limit: gates below it count as zero too (FATReLU). Single tokens on CPUs read only the rows of the output map that they
    need; the gate and the linear half are computed whole.
    """

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = (
        "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models (2024)"
    )
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise InputError(f"limit={self.limit:g}; give 0 or more")

    @contextmanager
    def wrapped(self, model: PreTrainedModel) -> Iterator[None]:
        """The model with its neurons skipped. Raises InputError unless its activations are ReLUs."""
        before = [(parent, name, getattr(parent, name)) for parent, name in activations(model)]
        if any(not torch.equal(act(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0])) for _, _, act in before):
            raise InputError("prosparse skips neurons of ReLUs, and this model has others; run assay.tune_relu on it first")
        try:
            for parent, name, _ in before:
                setattr(parent, name, FatReLU(self.limit))
            with gated(outputs(model), dict.fromkeys(outputs(model), Gate(0.0)), True):
                yield
        finally:
            for parent, name, act in before:
                setattr(parent, name, act)


METHOD = ProSparse
