"""Inputs by their size times their column's norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from assay.methods.activation._sparse import Sparse


@dataclass(frozen=True, eq=False)
class Wina(Sparse):
    """Leaves out the inputs whose contribution to the output has the smallest norm; without the rotation of weights."""

    paper: ClassVar[str] = "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (2025)"

    def scale(self, weight: Tensor) -> Tensor:
        """Norms of the columns."""
        return weight.norm(dim=0)


METHOD = Wina
