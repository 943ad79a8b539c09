"""The largest inputs exactly, the rest through a low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from assay.methods.activation._sparse import Gate, Sparse, quantile


@dataclass(frozen=True, eq=False)
class RSparse(Sparse):
    """Of what each map may read, a share goes to whole columns and the rest to leading singular directions.

    The share is the one of `splits` with the least output error on the calibration text, for each map; the paper searches
    by evolution against perplexity.
    """

    paper: ClassVar[str] = "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference (2025)"
    splits: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0)

    def gate(self, weight: Tensor, inputs: Tensor, sparsity: float) -> Gate:
        """See `Sparse`."""
        exact = inputs @ weight.T
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        factors = right.T, (left * values).T
        gates = [self._split(weight, inputs, sparsity, split, factors) for split in self.splits]
        return min(gates, key=lambda g: float((_output(g, weight, inputs) - exact).square().sum()))

    def _split(self, weight: Tensor, inputs: Tensor, sparsity: float, split: float, factors: tuple[Tensor, Tensor]) -> Gate:
        out, width = weight.shape
        scale = weight.norm(dim=0) if split < 1 else None
        channels = width * (1 - sparsity) * split
        rank = int((width * out * (1 - sparsity) - channels * out) / (width + out))
        threshold = quantile(inputs.abs() if scale is None else inputs.abs() * scale, 1 - (1 - sparsity) * split)
        return Gate(threshold, scale, (factors[0][:, :rank], factors[1][:rank]) if rank else None)


def _output(gate: Gate, weight: Tensor, inputs: Tensor) -> Tensor:
    kept = gate.kept(inputs)
    out = (inputs * kept) @ weight.T
    return out if gate.factors is None else out + ((inputs * ~kept) @ gate.factors[0]) @ gate.factors[1]


METHOD = RSparse
