"""Rotary positions of a model, forwards and backwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

STATIC = ("default", "linear", "llama3", "yarn")
"""Rotations whose angles depend on nothing but the position."""
POSITIONS = 256


class Angles:
    """Cosines and sines of the positions met so far, float32 [positions, pairs]: shared by layers that turn alike."""

    def __init__(self) -> None:
        self.cos = self.sin = torch.empty(0, 0)

    def reach(self, count: int, rotary: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device) -> None:
        """Have the first `count` positions at least. rotary: cos and sin [1, n, 2 * pairs] of positions int [1, n]."""
        if count > len(self.cos):
            count += -count % POSITIONS
            cos, sin = rotary(torch.arange(count, device=device)[None])
            self.cos, self.sin = (x[0, :, : x.shape[2] // 2].float().contiguous() for x in (cos, sin))


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one layer's keys."""

    model: PreTrainedModel
    layer: int
    angles: Angles = field(default_factory=Angles)

    @classmethod
    def of(cls, model: PreTrainedModel) -> list[Rope]:
        """That of each layer."""
        count = model.config.num_hidden_layers
        kinds = getattr(model.config, "layer_types", None) or [""] * count
        shared = {kind: Angles() for kind in kinds}
        return [cls(model, i, shared[kinds[i]]) for i in range(count)]

    def met(self, where: Tensor) -> None:
        """Be ready for `known` at these positions."""
        if self._static():
            self.angles.reach(int(where.max()) + 1, lambda x: self._tables(torch.empty(0, device=x.device), x), where.device)

    def known(self) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the positions met, float32 [positions, pairs] on a CPU; None where they aren't kept."""
        return (self.angles.cos, self.angles.sin) if len(self.angles.cos) and self.angles.cos.device.type == "cpu" else None

    def _static(self) -> bool:
        kind: Any = getattr(self.model.base_model.rotary_emb, "rope_type", "")
        return (kind.get(self.model.config.layer_types[self.layer]) if isinstance(kind, dict) else kind) in STATIC

    def turn(self, x: Tensor, where: Tensor, back: bool = False) -> Tensor:
        """Rotate x [B, H, n, D] to positions int [B, n], or undo that; channels beyond the rotary ones stay."""
        cos, sin = (t[:, None] for t in self._tables(x, where))
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        swapped = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
        if back:
            turned = (turned * cos - swapped * sin) / (cos.square() + sin.square())
        else:
            turned = turned * cos + swapped * sin
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def _tables(self, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        rotary: Any = self.model.base_model.rotary_emb
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        kinds = (self.model.config.layer_types[self.layer],) if typed else ()
        cos, sin = rotary(x, where.long(), *kinds)
        return cos, sin
