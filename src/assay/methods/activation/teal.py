"""Inputs by their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from assay.methods.activation._sparse import Sparse


@dataclass(frozen=True, eq=False)
class Teal(Sparse):
    """Leaves out the smallest inputs of each linear map."""

    paper: ClassVar[str] = "Training-Free Activation Sparsity in Large Language Models (2024)"


METHOD = Teal
