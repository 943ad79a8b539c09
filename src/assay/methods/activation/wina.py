"""Inputs by their size times their column's norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from assay.methods.activation._sparse import Sparse, Turn
from assay.model.arch import facts

LEADERS = ("attn.k", "attn.qkv", "mlp.gate", "mlp.gate_up")


@dataclass(frozen=True, eq=False)
class Wina(Sparse):
    """Leaves out the inputs whose contribution to the output has the smallest norm.

    rotate: bring the inputs of attention and of the feed-forward block to the right singular vectors of k_proj and of
    gate_proj. The columns of these two are orthogonal then, so that no other choice of as many inputs loses less, and with
    grouped queries most columns of k_proj are zero. The function stays the same. The paper turns the whole residual stream
    and its shortcuts; turning what each sub-block reads is the same for one product less a block, of [in, in] a token.
    """

    paper: ClassVar[str] = "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (2025)"
    rotate: bool = False

    def scale(self, weight: Tensor) -> Tensor:
        """Norms of the columns."""
        return weight.norm(dim=0)

    def turns(self, maps: Mapping[str, nn.Linear]) -> dict[str, Turn]:
        """The singular vectors, for all maps that read what the leading one reads."""
        if not self.rotate:
            return {}
        known = facts()
        roles = {known["roles"].get(name.rpartition(".")[2]): name for name in maps}
        found: dict[str, Turn] = {}
        for lead in (r for r in LEADERS if r in roles):
            group = next((g for g in known["shared_input"] if lead in g), [lead])
            names = [roles[r] for r in group if r in roles]
            weight = maps[roles[lead]].weight.detach().double()
            turn = Turn(torch.linalg.svd(weight, full_matrices=True)[2].mT.float(), len(names))
            found |= dict.fromkeys(names, turn)
        return found


METHOD = Wina
