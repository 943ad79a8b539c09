"""KL divergence of many variants of one model at once: what they share is loaded and run once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from assay.measure.stream import Override, StreamedModel, batches, micro


@torch.no_grad()
def mean_kl(
    model: StreamedModel, ids: Tensor, variants: Sequence[Sequence[Hashable]], override: Callable[[int, Hashable], Override]
) -> list[float]:  # fmt: skip
    """Nats per predicted token from the original to each variant, on windows ids [n, length].

    variants: a key for every block, None for the original; equal keys of a block mean equal weights, which
    `override(block, key)` makes. A block is in memory once for each of its keys, and runs once for each different
    start of a variant. So memory is one block and the hidden states of the different variants.
    """
    parts = batches(ids)
    model.forget()
    with model.outside(tail=False):
        states: dict[tuple[Hashable, ...], list[Tensor]] = {(): [model.embed(part) for part in parts]}
    everyone = [(None,) * len(model.blocks), *(tuple(variant) for variant in variants)]
    for index in range(len(model.blocks)):
        states = _through(model, index, states, {v[: index + 1] for v in everyone}, override)
    finals = list(dict.fromkeys(everyone[1:]))
    sums = dict.fromkeys(finals, 0.0)
    with model.outside(tail=True):
        for part in range(len(parts)):
            pieces = {v: micro(states[v][part], model.vocabulary) for v in {everyone[0], *finals}}
            for number, hidden in enumerate(pieces[everyone[0]]):
                p = model.logits(hidden)[:, :-1].log_softmax(-1)
                for v in finals:
                    q = model.logits(pieces[v][number])[:, :-1].log_softmax(-1)
                    sums[v] += float((p.exp() * (p - q)).sum(-1).clamp_min(0).double().sum())
    count = ids.numel() - len(ids)
    return [sums[v] / count for v in everyone[1:]]


def _through(
    model: StreamedModel, index: int, states: dict[tuple[Hashable, ...], list[Tensor]], wanted: set[tuple[Hashable, ...]],
    override: Callable[[int, Hashable], Override],
) -> dict[tuple[Hashable, ...], list[Tensor]]:  # fmt: skip
    """Hidden states behind block `index` for every wanted start of a variant."""
    by_key: dict[Hashable, list[tuple[Hashable, ...]]] = {}
    for start in wanted:
        by_key.setdefault(start[-1], []).append(start)
    after = {}
    for key, starts in by_key.items():
        with model.block(index, None if key is None else override(index, key)):
            for start in starts:
                after[start] = [model.run_block(index, hidden, b) for b, hidden in enumerate(states[start[:-1]])]
    return after
