"""How many neurons of the feed-forward blocks a token can do without for p percent of perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from assay.measure.cut_cross_entropy import cut_cross_entropy
from assay.methods.activation._sparse import Gate, blocks, gated
from assay.model.errors import InputError
from assay.runtime.select import bisect


@dataclass(frozen=True, eq=False)
class PplP:
    """Masks neurons of the feed-forward blocks until perplexity on the calibration text is `p` percent up.

    A neuron's size is the norm of what it adds; every layer loses the same share of its output (CETT), found by bisection,
    and that share in turn. sparsity: mean share of neurons masked; cett: of the output lost; both set by `calibrated`.
    """

    verb: ClassVar[str] = "attach"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    paper: ClassVar[str] = "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity (2024)"

    p: float = 1.0
    sparsity: float | None = None
    cett: float | None = None
    gates: Mapping[str, Gate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.p < 0:
            raise InputError(f"p={self.p:g}; give percent of perplexity, 0 or more")

    @torch.no_grad()
    def calibrated(self, model: PreTrainedModel, ids: Tensor) -> PplP:
        """With thresholds measured on token ids [windows, tokens]."""
        maps = outputs(model)
        seen = _neurons(model, maps, ids)
        dense = _loss(model, ids)
        limit = dense + math.log1p(self.p / 100)

        def at(cett: float) -> dict[str, Gate]:
            return {n: Gate(threshold(seen[n], m.weight.float(), cett), m.weight.float().norm(dim=0)) for n, m in maps.items()}

        def holds(cett: float) -> bool:
            with gated(maps, at(cett), True):
                return _loss(model, ids) <= limit

        cett = bisect(holds, 0.0, 1.0, 12)
        gates = at(cett)
        shares = [float((~gates[n].kept(seen[n])).float().mean()) for n in maps]
        return replace(self, gates=gates, sparsity=sum(shares) / len(shares), cett=cett)

    @contextmanager
    def wrapped(self, model: PreTrainedModel) -> Iterator[None]:
        """The model with its neurons masked."""
        with gated(outputs(model), self.gates, True):
            yield


def outputs(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The output map of each feed-forward block."""
    return {prefix: block.mlp.down_proj for prefix, block in blocks(model)}  # type: ignore[union-attr, misc]


def lost(neurons: Tensor, weight: Tensor, limit: float) -> float:
    """CETT: mean over tokens of the norm of what neurons [n, f] of size up to a limit add, over that of the whole output."""
    small = neurons.abs() * weight.norm(dim=0) <= limit
    whole = (neurons @ weight.T).norm(dim=1)
    return float((((neurons * small) @ weight.T).norm(dim=1) / whole.clamp_min(1e-20)).mean())


def threshold(neurons: Tensor, weight: Tensor, cett: float) -> float:
    """The largest size of neurons, found by bisection, at which no more than a share of the output is lost."""
    top = float((neurons.abs() * weight.norm(dim=0)).max())
    return bisect(lambda limit: lost(neurons, weight, limit) <= cett, 0.0, top, 24)


def _neurons(model: PreTrainedModel, maps: Mapping[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    held: dict[str, list[Tensor]] = {name: [] for name in maps}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: held[n].append(x[0].flatten(0, -2).float())) for n, m in maps.items()]
    _loss(model, ids)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(x)[:: max(1, sum(map(len, x)) // 512)] for n, x in held.items()}


def _loss(model: PreTrainedModel, ids: Tensor) -> float:
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    total = 0.0
    for part in ids.to(model.device).split(8):
        hidden = model.base_model(input_ids=part, use_cache=False).last_hidden_state
        total += float(cut_cross_entropy(hidden, head.weight, part, softcap=cap, shift=True, reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


METHOD = PplP
