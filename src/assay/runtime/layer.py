"""A cache layer on transformers' interface: it hands its tensors to the attention function, which hands them back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from assay.model.errors import InputError
from assay.runtime.attention import EMPTY, Rule, Step
from assay.runtime.lane import Arrival, Lane
from assay.runtime.policy import Evictor, Stack
from assay.runtime.select import allocate, prefix_counts, pyramid
from assay.runtime.tape import bytes_of


@dataclass(frozen=True)
class Pending:
    """New keys and values [B, H, L, D] on their way from `update` to the attention function."""

    layer: Layer
    keys: Tensor
    values: Tensor


class Layer(CacheLayerMixin):
    """One layer. `siblings` are all layers of the cache, in order: some budgets are shared among them."""

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, stack: Stack, index: int, siblings: list[Layer], width: int | None) -> None:
        super().__init__()
        self.stack, self.index, self.siblings, self.width = stack, index, siblings, width
        self.closed = False
        self._clear()

    def _clear(self) -> None:
        self.lanes: list[Lane] = []
        self.is_initialized = False
        self.seen, self.decoded = 0, 0
        self.first = torch.empty(0)
        self.begun = False
        self.prompt: list[int] = []
        self.capacity: list[list[int]] = []
        self.waiting: list[Step] = []
        self.window: int | None = None
        self.arrived: Arrival | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the lanes: one for all heads, or one for each where heads have budgets of their own."""
        heads = key_states.shape[1]
        apart = _by_head(self.stack.evictor, self.index, heads)
        self.lanes = [Lane(self.stack, self.index, h) for h in range(heads if apart else 1)]
        self.first = key_states.new_full((len(key_states),), EMPTY, dtype=torch.long)
        self.prompt = [0] * len(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Pending, None]:  # type: ignore[override]
        """Hold new keys and values until the attention function comes with the queries."""
        if self.closed:
            raise InputError("this cache was made inside `with assay.attach(...)`, which has ended; start a new one")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return Pending(self, key_states, value_states), None

    def attend(self, query: Tensor, pending: Pending, padding: Tensor | None, where: Tensor | None, rule: Rule) -> Tensor:
        """Append, attend on everything, then drop and store: output [B, Hq, L, D].

        padding: bool [B, seen + L], False for padding; where: int [B or 1, L], positions for RoPE.
        """
        length, share = query.shape[2], len(self.lanes)
        if self.width is not None and self.seen + length > self.width:
            raise InputError(f"{self.seen + length} tokens in a context of {self.width}; give a shorter text")
        new = self._arrival(query, padding, where)
        if share == 1:
            out, step = self.lanes[0].step(query, pending.keys, pending.values, new, rule)
            self._after([step], new.prefill, rule)
            return out
        parts, steps = [], []
        for lane, q, k, v in zip(self.lanes, query.chunk(share, 1), pending.keys.chunk(share, 1), pending.values.chunk(share, 1),
                                 strict=True):  # fmt: skip
            out, step = lane.step(q, k, v, new, rule)
            parts.append(out)
            steps.append(step)
        self._after(steps, new.prefill, rule)
        return torch.cat(parts, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing had been dropped; the attention function makes its own mask from positions."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. Raises InputError where some were dropped or quantized: they can't come back."""
        evictor, count = self.stack.evictor, abs(tokens_to_remove)
        changed = evictor is not None and (evictor.budget < 1 or evictor.tokens is not None)
        if changed or self.stack.packers or self.window is not None or tokens_to_remove > 0 or count > self.seen:
            raise InputError("a cache that drops or quantizes can't be cropped; generate without assisted decoding")
        for lane in self.lanes:
            lane.crop(count)
        self.seen -= count
        self.prompt = [n - count for n in self.prompt]

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, with all that was counted for them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if not self.is_initialized:
            return
        for lane in self.lanes:
            lane.rows(indices)
        self.first = self.first[indices.to(self.first.device)]
        places = indices.tolist()
        self.prompt = [self.prompt[i] for i in places]
        self.capacity = [[lane[i] for i in places] for lane in self.capacity]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(len(self.first)).repeat_interleave(repeats))

    def tensors(self, away: bool = False) -> Iterator[Tensor]:
        """Everything held where the model computes, or what is kept away from there."""
        for lane in self.lanes:
            yield from lane.tensors(away)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held where the model computes, positions and statistics included."""
        return bytes_of(self.tensors())

    @property
    def away(self) -> int:
        """Bytes of keys and values kept in host memory or in a mapped file instead."""
        return bytes_of(self.tensors(away=True))

    def kept(self) -> list[Tensor]:
        """For each lane the positions of its slots, int [B, H or 1, S]; EMPTY where there is none."""
        return [lane.positions for lane in self.lanes]

    def _arrival(self, query: Tensor, padding: Tensor | None, where: Tensor | None) -> Arrival:
        """Count new tokens in. Raises InputError for padding that isn't on the left.

        What the first layer has found out about them holds for all.
        """
        batch, length, device, seen = query.shape[0], query.shape[2], query.device, self.seen
        leader = self.siblings[0]
        if leader is not self and leader.arrived is not None and leader.seen == seen + length:
            self.seen, self.decoded, self.prompt = leader.seen, leader.decoded, leader.prompt
            self.first, self.begun, self.arrived = leader.first, leader.begun, leader.arrived
            return self.arrived
        real = None if padding is None else self._real(batch, length, padding)
        if self.begun and (real is None or bool(real.all())):
            real = None
        slots = torch.arange(seen, seen + length, device=device).expand(batch, -1)
        positions = slots if real is None else torch.where(real, slots, EMPTY)
        if not self.begun:
            started = self.first < 0 if real is None else (self.first < 0) & real.any(1)
            offset: Tensor | int = 0 if real is None else real.int().argmax(1)
            self.first = torch.where(started, seen + offset, self.first)
            self.begun = real is None or bool((self.first >= 0).all())
        prefill = length > 1 or seen == 0
        self.seen += length
        if prefill:
            counts = [length] * batch if real is None else real.sum(1).tolist()
            self.prompt = [n + more for n, more in zip(self.prompt, counts, strict=True)]
        else:
            self.decoded += 1
        places = (positions - self.first[:, None]).clamp_min(0) if where is None else where.expand(batch, -1)
        self.arrived = Arrival(positions, places, self.first, real is not None, self.seen - 1, prefill, self.decoded)
        return self.arrived

    def _real(self, batch: int, length: int, padding: Tensor) -> Tensor:
        real = padding[:, self.seen : self.seen + length]
        if real.shape != (batch, length):
            raise InputError(
                f"an attention mask of {padding.shape[1]} for {self.seen + length} tokens; give one for all tokens so far"
            )
        if not bool((real[:, 1:] >= real[:, :-1]).all()) or bool((~real[:, 0] & (self.first >= 0)).any()):
            raise InputError("padding behind text; pad on the left: tokenizer.padding_side = 'left'")
        return real

    def _after(self, steps: list[Step], prefill: bool, rule: Rule) -> None:
        evictor, self.window = self.stack.evictor, rule.window
        if rule.window is not None:
            for lane in self.lanes:
                lane.slide(self.seen - 1, rule.window)
        if evictor and evictor.shape == "prefix" and prefill:
            self.waiting = steps
            if self.index == len(self.siblings) - 1:
                _settle(self.siblings, evictor)
            return
        if evictor and prefill:
            self.capacity = _capacities(evictor, self.prompt, self.index, len(self.siblings), [s.keys.shape[1] for s in steps])
        self._shrink(steps)

    def _shrink(self, steps: Sequence[Step]) -> None:
        evictor = self.stack.evictor
        for i, (lane, step) in enumerate(zip(self.lanes, steps, strict=True)):
            if evictor and self.capacity:
                lane.evict(step, self._now(evictor, self.capacity[i]))
            lane.store(step)

    def _now(self, evictor: Evictor, capacity: Sequence[int]) -> list[int]:
        """The capacity after `decoded` more tokens: a share of all tokens, unless it is a number or all of them stay."""
        limit = self.seen if self.window is None or evictor.tokens is not None else math.ceil(evictor.budget * self.window)
        if evictor.grows:
            return [min(c, limit) + self.decoded for c in capacity]
        limit = max(limit, evictor.sinks + 1)
        if evictor.tokens is not None:
            return [min(c, limit) for c in capacity]
        return [min(c + c * self.decoded // max(n, 1), limit) for c, n in zip(capacity, self.prompt, strict=True)]


def base_capacity(evictor: Evictor, prompt: int) -> int:
    """Tokens that a layer keeps of a prompt on average. Raises InputError where that is less than the sinks."""
    base = evictor.tokens if evictor.tokens is not None else math.ceil(evictor.budget * prompt - 1e-9)
    if base <= evictor.sinks and base < prompt:
        raise InputError(
            f"a budget of {evictor.budget:g} of {prompt} tokens is {base}, no more than the {evictor.sinks} first that always "
            "stay; give a larger budget or fewer sinks"
        )
    return base


def _capacities(evictor: Evictor, prompt: Sequence[int], index: int, layers: int, heads: Sequence[int]) -> list[list[int]]:
    """Tokens kept in each lane of a layer, for each row."""
    rows = []
    for count in prompt:
        base = base_capacity(evictor, count)
        weights = _weights(evictor, layers, len(heads))
        flat = [w for layer in weights for w in layer]
        split = (
            allocate(flat, base * len(flat), min(evictor.sinks + 1, base), max(count, base))
            if len({*flat}) > 1
            else [base] * len(flat)
        )
        rows.append(split[index * len(heads) : (index + 1) * len(heads)])
    return [list(column) for column in zip(*rows, strict=True)]


def _weights(evictor: Evictor, layers: int, lanes: int) -> list[list[float]]:
    shape = evictor.shape
    if isinstance(shape, str):
        return [[w] * lanes for w in (pyramid(layers) if shape == "pyramid" else [1.0] * layers)]
    if len(shape) != layers:
        raise InputError(f"a shape of {len(shape)} layers for a model of {layers}; give a weight for each layer")
    return [[float(x)] * lanes if isinstance(x, (int, float)) else [float(y) for y in x] for x in shape]


def _by_head(evictor: Evictor | None, index: int, heads: int) -> bool:
    if evictor is None or isinstance(evictor.shape, str):
        return False
    if not any(isinstance(x, (tuple, list)) for x in evictor.shape):
        return False
    if any(not isinstance(x, (tuple, list)) or len(x) != heads for x in evictor.shape):
        raise InputError(f"a shape with weights for heads needs {heads} in every layer")
    return True


def _settle(layers: Sequence[Layer], evictor: Evictor) -> None:
    """Share the budget of all layers by the mass of their scores, then drop."""
    prompts = layers[0].prompt
    counts = []
    for row, prompt in enumerate(prompts):
        curves = []
        for layer in layers:
            (lane,), (step,) = layer.lanes, layer.waiting
            score = evictor.score(step, lane.statistics)[row].clamp_min(0)
            present = step.positions[row].expand(len(score), -1) >= 0
            curves.append((score * present).mean(0)[present.any(0)])
        total = base_capacity(evictor, prompt) * len(layers)
        floor = evictor.sinks + 1
        counts.append([max(c, min(floor, prompt)) for c in prefix_counts(curves, total)])
    for i, layer in enumerate(layers):
        layer.capacity = [[c[i] for c in counts]]
        waiting, layer.waiting = layer.waiting, []
        layer._shrink(waiting)
