"""How much each token counts in H: all alike, by the attention it receives, or by its place in the window.

RSQ: Learning from Important Tokens Leads to Better Quantized LLMs (2025).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from assay.measure.stream import StreamedModel
from assay.model.errors import InputError

_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
FLOOR = 0.005
"""Weight of the token that receives least, where the one that receives most has 1."""


def check(kind: str) -> None:
    """Raises InputError for anything but "none", "attention", "first-N" and "chunk-A-B" (tokens A to B - 1)."""
    if kind not in ("none", "attention") and _range(kind) is None:
        raise InputError(f"unknown token weights {kind!r}; give none, attention, first-N or chunk-A-B, like chunk-64-128")


@torch.no_grad()
def weights(kind: str, model: StreamedModel, index: int, hidden: Tensor, batch: int) -> Tensor | None:
    """A weight for each token of a batch, float32 [windows, tokens], each window's mean 1; None if all are alike.

    hidden: input of the loaded block `index`, which is run once more where its attention is wanted. Raises InputError
    for a kind that `check` refuses, a range outside the window, and a block that shows no attention.
    """
    check(kind)
    if kind == "none":
        return None
    if (span := _range(kind)) is not None:
        return by_position(hidden.shape[:2], *span)
    with AttentionSums() as sums:
        model.run_block(index, hidden, batch)
    if sums.received is None:
        raise InputError(f"{model.anatomy.family} shows no attention; use --token-weights first-N, chunk-A-B or none")
    return concentrated(sums.received)


def by_position(shape: tuple[int, int] | torch.Size, first: int, stop: int) -> Tensor:
    """Weights [windows, tokens] that are equal from token `first` to before `stop`, and 0 elsewhere."""
    if not 0 <= first < stop <= shape[1]:
        raise InputError(f"tokens {first} to {stop} of windows of {shape[1]}; give a range inside the window")
    found = torch.zeros(*shape)
    found[:, first:stop] = shape[1] / (stop - first)
    return found


def concentrated(received: Tensor, floor: float = FLOOR) -> Tensor:
    """Attention received [windows, tokens], stretched to [floor, 1] in each window and divided by its mean."""
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    stretched = floor + (1 - floor) * (received - low) / (high - low).clamp_min(torch.finfo(received.dtype).tiny)
    return stretched / stretched.mean(1, keepdim=True)


class AttentionSums(TorchFunctionMode):
    """Adds up the attention that each token receives, over heads and queries, while a block runs.

    received: float32 [windows, tokens], None while no attention has run: no scaled dot product attention, which is
    computed once more beside the block's own, a head at a time, and no softmax over [windows, heads, queries, keys].
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if func is functional.scaled_dot_product_attention:
                self._add(_received(*args, **(kwargs or {})))
            elif func in _SOFTMAX and result.ndim == 4:
                self._add(result.float().sum((1, 2)))
        return result

    def _add(self, found: Tensor) -> None:
        self.received = found if self.received is None else self.received + found


def _received(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Column sums of the attention of a call of `scaled_dot_product_attention`, [windows, keys]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = torch.zeros(query.shape[-2], key.shape[-2])
    if is_causal:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        extra = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias + extra.float()
    bias = bias.expand(*query.shape[:2], *bias.shape[-2:])
    shared = query.shape[1] // key.shape[1]
    total = torch.zeros(len(query), key.shape[-2])
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ key[:, head // shared].float().mT * scale + bias[:, head]
        total += scores.softmax(-1).nan_to_num().sum(1)
    return total


def _range(kind: str) -> tuple[int, int] | None:
    """(first, stop) of "first-N" and "chunk-A-B"."""
    match = re.fullmatch(r"(?:first|chunk-(\d+))-(\d+)", kind)
    return None if match is None else (int(match[1] or 0), int(match[2]))
