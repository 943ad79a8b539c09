"""Cross-entropy from hidden states without ever holding the logits.

Cut Your Losses in Large-Vocabulary Language Models (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TILE = 1 << 22
IGNORED = -100


def cut_cross_entropy(
    hidden: Tensor, classifier: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float | None = None,
    shift: bool = False, reduction: str = "mean", epsilon: float | None = None,
) -> Tensor:  # fmt: skip
    """Loss in nats of hidden states [..., d] through a classifier [V, d] against targets int [...].

    The same as `torch.nn.functional.cross_entropy(hidden @ classifier.T + bias, targets)`, in memory that doesn't grow with
    V beyond the classifier and its gradient: logits are made tile by tile, and again in the backward pass, where a tile
    in which no probability (less the target's 1) reaches epsilon is skipped. epsilon: None for the dtype's resolution
    over 32, 0 to skip nothing. shift: a hidden state predicts the next target, along the last axis but one. Targets of
    -100 don't count. reduction: mean, sum or none (float32 [...]).
    """
    if shift:
        hidden, targets = hidden[..., :-1, :], targets[..., 1:]
    shape = targets.shape
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    counted = wanted != IGNORED
    limit = torch.finfo(hidden.dtype).eps / 32 if epsilon is None else epsilon
    losses: Tensor = _Cut.apply(rows[counted], classifier, bias, wanted[counted], softcap, limit)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return losses.new_zeros(counted.shape).masked_scatter(counted, losses).view(shape)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}; mean, sum or none")
    return losses.sum() if reduction == "sum" else losses.mean()


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, classifier: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None,
                epsilon: float) -> Tensor:  # fmt: skip
        lse = hidden.new_full((len(hidden),), -torch.inf, dtype=_wide(hidden.dtype))
        means = torch.zeros(len(classifier), dtype=lse.dtype, device=lse.device)
        for words in _tiles(len(hidden), len(classifier)):
            logits = _logits(hidden, classifier[words], None if bias is None else bias[words], softcap)
            lse = torch.logaddexp(lse, logits.logsumexp(1))
            means[words] = logits.mean(0) if len(logits) else 0
        own = (hidden * classifier[targets]).sum(1).to(lse.dtype)
        own = own if bias is None else own + bias[targets]
        own = own if softcap is None else softcap * (own / softcap).tanh()
        ctx.save_for_backward(hidden, classifier, bias, targets, lse, means)
        ctx.softcap, ctx.epsilon = softcap, epsilon
        return lse - own

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, classifier, bias, targets, lse, means = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        d_classifier = torch.zeros_like(classifier)
        d_bias = None if bias is None else torch.zeros_like(bias)
        # words of like mean logit share tiles, so that tiles without weight are many
        order = means.argsort(descending=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[targets]
        for tile in _tiles(len(hidden), len(classifier)):
            words = order[tile]
            block = classifier[words]
            logits = _logits(hidden, block, None if bias is None else bias[words], ctx.softcap)
            slope = (logits - lse[:, None]).exp()
            mine = ((place >= tile.start) & (place < tile.stop)).nonzero()[:, 0]
            slope[mine, place[mine] - tile.start] -= 1
            if not slope.numel() or float(slope.abs().max()) < ctx.epsilon:
                continue
            if ctx.softcap is not None:
                slope = slope * (1 - (logits / ctx.softcap).square())
            slope = slope * upstream[0][:, None]
            d_hidden += slope @ block.to(slope.dtype)
            d_classifier[words] = (slope.T @ hidden.to(slope.dtype)).to(classifier.dtype)
            if d_bias is not None:
                d_bias[words] = slope.sum(0).to(d_bias.dtype)
        return d_hidden.to(hidden.dtype), d_classifier, d_bias, None, None, None


def _tiles(rows: int, words: int) -> list[slice]:
    size = max(64, TILE // max(rows, 1))
    return [slice(start, min(start + size, words)) for start in range(0, words, size)]


def _logits(hidden: Tensor, classifier: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    found = (hidden @ classifier.T).to(_wide(hidden.dtype))
    found = found if bias is None else found + bias
    return found if softcap is None else softcap * (found / softcap).tanh()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
