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


def logits(query: Tensor, keys: Tensor, rule: Rule) -> Tensor:
    """query [B, Hq, L, D], keys [B, H, S, D] -> float32 [B, H, g, L, S], scaled and capped, not masked."""
    folded = grouped(query, keys.shape[1])
    found = (folded.flatten(2, 3) @ keys.mT).unflatten(2, folded.shape[2:4]).float() * rule.scaling
    return found if rule.softcap is None else (found / rule.softcap).tanh() * rule.softcap


def probabilities(query: Tensor, keys: Tensor, seen: Tensor | None, rule: Rule, temperature: float = 1.0,
                  noise: Tensor | None = None) -> Tensor:  # fmt: skip
    """Attention float32 [B, H, g, L, S]; zero where nothing is seen. seen: bool [B, H or 1, L, S] or None for all.

    noise: added to the logits before they are divided by the temperature.
    """
    found = logits(query, keys, rule)
    if noise is not None:
        found = found + noise
    if temperature != 1:
        found = found / temperature
    if seen is None:
        return found.softmax(-1)
    hidden = ~seen[:, :, None]
    return found.masked_fill_(hidden, torch.finfo(found.dtype).min).softmax(-1).masked_fill_(hidden, 0)


def attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Output [B, Hq, L, D] and, for a single query, the attention [B, H, g, 1, S]. seen: None where causality is all."""
    length, slots = query.shape[2], keys.shape[2]
    if length == 1:
        found = probabilities(query, keys, seen, rule)
        return (found.flatten(2, 3).to(values.dtype) @ values).flatten(1, 2)[:, :, None], found
    if rule.softcap is not None:
        return _chunked(query, keys, values, seen, rule), None
    if seen is None:
        if length != slots:
            raise ValueError("causality alone needs as many queries as keys")
        out = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=rule.scaling, enable_gqa=query.shape[1] != keys.shape[1]
        )
        return out, None
    # a query that sees nothing is padding; it may see all, because nothing reads it
    seen = seen | ~seen.any(-1, keepdim=True)
    folded = grouped(query, keys.shape[1])
    mask = seen[:, :, None].expand(-1, -1, folded.shape[2], -1, -1).flatten(2, 3)
    out = functional.scaled_dot_product_attention(folded.flatten(2, 3), keys, values, attn_mask=mask, scale=rule.scaling)
    return out.unflatten(2, folded.shape[2:4]).flatten(1, 2), None


def _chunked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, rule: Rule) -> Tensor:
    length, slots = query.shape[2], keys.shape[2]
    if seen is None:
        order = torch.arange(slots, device=query.device)
        seen = visible(order[None, None], order[None, -length:], None)
    parts = []
    for rows in chunks(length, query.shape[0] * query.shape[1] * slots):
        found = probabilities(query[:, :, rows], keys, seen[:, :, rows], rule).to(values.dtype)
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

    layer: its index; head: index of the first key head; query [B, Hq, L, D] and keys, values [B, H, S, D] after RoPE;
    positions int [B, H or 1, S] of the slots, EMPTY where there is none; queries int [B, L], EMPTY for padding;
    where int [B, L]: their positions for RoPE; first int [B]: position of the first token of each row; prefill: several
    tokens, or the first; decoded: tokens since the prompt; attention: of a single query [B, H, g, 1, S].
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
    attention: Tensor | None = None

    def rows(self, last: int | None = None, temperature: float = 1.0, noise: Noise | None = None
             ) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
        """Attention [B, H, g, rows, S] of the last queries (all by default), some at a time; zero for padding."""
        length = self.query.shape[2]
        start = length - min(last or length, length)
        if self.attention is not None and temperature == 1 and noise is None:
            yield slice(0, 1), self.attention
            return
        for part in chunks(length - start, self.query.shape[0] * self.query.shape[1] * self.keys.shape[2]):
            rows = slice(part.start + start, part.stop + start)
            seen = visible(self.positions, self.queries[:, rows], self.rule.window)
            added = None if noise is None else noise(self, rows)
            yield rows, probabilities(self.query[:, :, rows], self.keys, seen, self.rule, temperature, added)

    def column_sums(self, last: int | None = None, temperature: float = 1.0, noise: Noise | None = None) -> Tensor:
        """Attention that each slot receives from the last queries, mean over the group's query heads: [B, H, S]."""
        return sum((group_reduce(x.sum(3)) for _, x in self.rows(last, temperature, noise)), torch.zeros(()))  # type: ignore[return-value]
