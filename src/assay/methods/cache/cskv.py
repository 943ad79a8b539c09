"""Low rank and an exact window."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from assay.methods.cache._packing import Packed, check_bits
from assay.methods.cache._rope import Rope
from assay.methods.cache._turning import turned_dots
from assay.methods.cache._watch import watch
from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.codecs import PerChannel, PerToken, Side, Tensors


@dataclass(frozen=True, eq=False)
class Basis:
    """All heads of a token as coordinates in a basis [H * D, r]; keys are turned back to position 0 first."""

    vectors: Tensor
    rope: Rope | None
    joint: ClassVar[bool] = True

    @property
    def positional(self) -> bool:
        """See `Map`: keys are."""
        return self.rope is not None

    def fit(self, x: Tensor, step: Step) -> Tensors:
        """See `Map`."""
        return {"heads": x.new_empty(len(x), x.shape[1], 0)}

    def forward(self, x: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`: [B, H, n, D] -> [B, 1, n, r]."""
        still = x
        if self.rope is not None:
            self.rope.met(where)
            still = self.rope.turn(x, where, back=True)
        return still.transpose(1, 2).flatten(2)[:, None] @ self.vectors.to(x.dtype)

    def backward(self, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`."""
        whole = (y[:, 0] @ self.vectors.to(y.dtype).mT).unflatten(2, (shared["heads"].shape[1], -1)).transpose(1, 2)
        return whole if self.rope is None else self.rope.turn(whole, where)

    def dual(self, query: Tensor, shared: Tensors) -> Tensor:
        """Never asked for."""
        raise NotImplementedError

    def products(self, query: Tensor, y: Tensor, shared: Tensors, where: Tensor) -> Tensor:
        """See `Map`: keys are rebuilt, turned and multiplied a few at a time."""
        known = None if self.rope is None else self.rope.known()
        if known is None or y.requires_grad or query.requires_grad:
            return query @ self.backward(y, shared, where).to(query.dtype).mT
        still = y[:, 0] @ self.vectors.to(y.dtype).mT
        return turned_dots(query.float(), still.float(), where, *known).to(query.dtype)

    def summed(self, y: Tensor, shared: Tensors) -> Tensor:
        """See `Map`: each head takes its own channels of the basis."""
        return y @ self.vectors.to(y.dtype).unflatten(0, (y.shape[1], -1)).mT


@dataclass(frozen=True, eq=False)
class CSKV(Packed):
    """Keys (before RoPE) and values of all heads in `density` of their dimensions; whole windows are written at once.

    The paper trains factors of the projections from an SVD start, layer by layer, to reproduce keys and values. Both
    are linear in the input, so the least squares that training approaches has a closed form: the leading directions of
    their second moment on the calibration text. That is what is used. bits: quantize the coordinates, 0 for not.

    Keys are rebuilt for every new token: 2 * density * (H * D)^2 operations a stored token. Beside the bases the policy keeps
    cosines and sines of the positions met, 4 * D bytes each, once for all layers that turn alike.
    """

    paper: ClassVar[str] = (
        "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios (2024), solved exactly"
    )
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    density: float = 0.25
    window: int = 32
    bits: int = 0
    group: int = 32
    bases: tuple[tuple[Basis, Basis], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"density={self.density:g}; give the share of dimensions to keep, above 0 and up to 1")
        if self.bits:
            check_bits(self.bits)

    def calibrated(self, model: PreTrainedModel, ids: Tensor) -> CSKV:
        """With bases measured on token ids [windows, tokens]."""
        moments: dict[tuple[int, int], Tensor] = {}

        def see(step: Step) -> None:
            still = Rope(model, step.layer).turn(step.keys, step.where, back=True)
            for side, x in enumerate((still, step.values)):
                rows = x.transpose(1, 2).flatten(2).flatten(0, 1).double()
                moments[step.layer, side] = moments.get((step.layer, side), 0) + rows.mT @ rows

        watch(model, ids, see)
        layers = 1 + max(layer for layer, _ in moments)
        ropes = Rope.of(model)
        pairs = [(self._basis(moments[i, 0], ropes[i]), self._basis(moments[i, 1], None)) for i in range(layers)]
        return replace(self, bases=tuple(pairs))

    def sides(self, layer: int) -> tuple[Side, Side]:
        """See `Packer`."""
        keys, values = self.bases[layer]
        codecs = (PerChannel(self.bits, self.window), PerToken(self.bits, self.group)) if self.bits else (None, None)
        return Side((keys,), codecs[0], 0, self.window), Side((values,), codecs[1], 0, self.window)

    def _basis(self, moment: Tensor, rope: Rope | None) -> Basis:
        rank = math.ceil(self.density * len(moment) - 1e-9)
        return Basis(torch.linalg.eigh(moment)[1].flip(1)[:, :rank].float(), rope)


METHOD = CSKV
