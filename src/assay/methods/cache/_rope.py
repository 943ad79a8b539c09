"""Rotary positions of a model, forwards and backwards."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Rope:
    """The rotation of one layer's keys."""

    model: PreTrainedModel
    layer: int

    def turn(self, x: Tensor, where: Tensor, back: bool = False) -> Tensor:
        """Rotate x [B, H, n, D] to positions int [B, n], or undo that; channels beyond the rotary ones stay."""
        cos, sin = self._tables(x, where)
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
        return cos[:, None], sin[:, None]
