"""Attention over a cache whose slots hold tokens of any positions, with one key head for each group of query heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EMPTY = -1
AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Rule:
    """How a layer attends. scaling: factor of the logits; window: tokens seen back, itself included; softcap: of logits."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


def visible(positions: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """Which slot each query sees: positions int [B, H or 1, S], queries int [B or 1, L] -> bool [B, H or 1, L, S]."""
    slots, asked = positions[:, :, None, :], queries[:, None, :, None]
    seen = (slots >= 0) & (slots <= asked)
    return seen if window is None else seen & (slots > asked - window)


def grouped(query: Tensor, heads: int) -> Tensor:
    """[B, Hq, L, D] -> [B, H, g, L, D]."""
    return query.unflatten(1, (heads, -1))


def group_reduce(x: Tensor, how: str = "mean") -> Tensor:
    """[B, H, g, ...] -> [B, H, ...] by mean, sum or max."""
    return x.amax(2) if how == "max" else getattr(x, how)(2)


def capped(found: Tensor, rule: Rule) -> Tensor:
    """Scaled logits, capped where the model caps them."""
    return found if rule.softcap is None else (found / rule.softcap).tanh() * rule.softcap


def logits(query: Tensor, keys: Tensor, rule: Rule) -> Tensor:
    """query [B, Hq, L, D], keys [B, H, S, D] -> float32 [B, H, g, L, S], scaled and capped, not masked."""
    folded = grouped(query, keys.shape[1])
    return capped((folded.flatten(2, 3) @ keys.mT).unflatten(2, folded.shape[2:4]).float() * rule.scaling, rule)


def softmaxed(found: Tensor, seen: Tensor | None) -> Tensor:
    """Attention from logits [B, H, g, L, S]; zero where nothing is seen. seen: bool [B, H or 1, L, S] or None for all."""
    if seen is None:
        return found.softmax(-1)
    hidden = ~seen[:, :, None]
    return found.masked_fill(hidden, torch.finfo(found.dtype).min).softmax(-1).masked_fill_(hidden, 0)


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, rule: Rule) -> Tensor:
    """Output [B, Hq, L, D]. seen: None where causality is all."""
    length, slots = query.shape[2], keys.shape[2]
    if length == 1:
        weights = softmaxed(logits(query, keys, rule), seen)[:, :, :, 0].to(values.dtype)
        return (weights @ values).flatten(1, 2)[:, :, None]
    if rule.softcap is not None:
        return _chunked(query, keys, values, seen, rule)
    if seen is None:
        if length != slots:
            raise ValueError("causality alone needs as many queries as keys")
        return functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=rule.scaling, enable_gqa=query.shape[1] != keys.shape[1]
        )
    # a query that sees nothing is padding; it may see all, because nothing reads it
    seen = seen | ~seen.any(-1, keepdim=True)
    folded = grouped(query, keys.shape[1])
    mask = seen[:, :, None].expand(-1, -1, folded.shape[2], -1, -1).flatten(2, 3)
    out = functional.scaled_dot_product_attention(folded.flatten(2, 3), keys, values, attn_mask=mask, scale=rule.scaling)
    return out.unflatten(2, folded.shape[2:4]).flatten(1, 2)


def _chunked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, rule: Rule) -> Tensor:
    length, slots = query.shape[2], keys.shape[2]
    if seen is None:
        order = torch.arange(slots, device=query.device)
        seen = visible(order[None, None], order[None, -length:], None)
    parts = []
    for rows in chunks(length, query.shape[0] * query.shape[1] * slots):
        found = softmaxed(logits(query[:, :, rows], keys, rule), seen[:, :, rows]).to(values.dtype)
        parts.append((found.flatten(2, 3) @ values).unflatten(2, found.shape[2:4]))
    return torch.cat(parts, 3).flatten(1, 2)


def chunks(length: int, per_row: int) -> Iterator[slice]:
    """Slices of `length` queries whose attention stays within a bounded number of elements."""
    size = max(1, AT_ONCE // max(per_row, 1))
    yield from (slice(start, min(start + size, length)) for start in range(0, length, size))


Noise = Callable[["Step", slice], Tensor]
"""Gives what to add to the logits [B, H, g, rows, S] of some queries of a step."""


@dataclass(frozen=True)
class Step:
    """What a policy sees after a layer attended to new tokens: nothing of later tokens, nothing of other rows.

    layer: its index; head: index of the first key head; query [B, Hq, L, D] and keys, values [B, H, S, D] after RoPE (of a
    single query the new token's only); positions int [B, H or 1, S] of the slots, EMPTY where there is none; queries int
    [B, L], EMPTY for padding; where int [B, L]: their positions for RoPE; first int [B]: position of the first token of
    each row; prefill: several tokens, or the first; decoded: tokens since the prompt; newest: the latest position; found:
    of a single query its logits [B, H, g, 1, S], scaled and capped, and attention: what became of them.
    """

    layer: int
    head: int
    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor
    where: Tensor
    first: Tensor
    rule: Rule
    prefill: bool
    decoded: int = 0
    newest: int = 0
    found: Tensor | None = None
    attention: Tensor | None = None
    whole: bool = False

    def rows(self, last: int | None = None, temperature: float = 1.0, noise: Noise | None = None
             ) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
        """Attention [B, H, g, rows, S] of the last queries (all by default), some at a time; zero for padding.

        noise: added to the logits before they are divided by the temperature.
        """
        length, slots = self.query.shape[2], self.positions.shape[2]
        start = length - min(last or length, length)
        if self.attention is not None and temperature == 1 and noise is None:
            yield slice(0, 1), self.attention
            return
        for part in chunks(length - start, self.query.shape[0] * self.query.shape[1] * slots):
            rows = slice(part.start + start, part.stop + start)
            seen = None if self.whole else visible(self.positions, self.queries[:, rows], self.rule.window)
            found = logits(self.query[:, :, rows], self.keys, self.rule) if self.found is None else self.found
            if noise is not None:
                found = found + noise(self, rows)
            yield rows, softmaxed(found if temperature == 1 else found / temperature, seen)

    def column_sums(self, last: int | None = None, temperature: float = 1.0, noise: Noise | None = None) -> Tensor:
        """Attention that each slot receives from the last queries, mean over the group's query heads: [B, H, S]."""
        sums = [group_reduce(x[:, :, :, 0] if x.shape[3] == 1 else x.sum(3)) for _, x in self.rows(last, temperature, noise)]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
