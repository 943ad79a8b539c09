"""The cache of some heads of one layer that keep equally many tokens: tapes, positions, and what a policy counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from assay.runtime.attention import EMPTY, Rule, Step, attend, visible
from assay.runtime.policy import Stack
from assay.runtime.select import drop_lowest, protect
from assay.runtime.tape import Tape, gather


class Lane:
    """Slots of the key heads `head` to `head + heads` of a layer."""

    def __init__(self, stack: Stack, layer: int, head: int) -> None:
        self.stack, self.layer, self.head = stack, layer, head
        keys, values = stack.sides(layer)
        self.keys, self.values = Tape(keys), Tape(values)
        self.labels = Tape() if stack.reader else None
        self.positions = torch.empty(0)
        self.where = torch.empty(0)
        self.statistics: tuple[Tensor, ...] = ()
        self._positional = any(m.positional for side in (keys, values) if side for m in side.maps)

    def __len__(self) -> int:
        return len(self.keys)

    def step(self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, where: Tensor, first: Tensor, rule: Rule,
             prefill: bool, decoded: int) -> tuple[Tensor, Step]:  # fmt: skip
        """Append new tokens and attend: output [B, Hq, L, D], and what the policy may look at.

        query [B, Hq, L, D]; keys, values [B, H, L, D] after RoPE; positions, where int [B, L]: slot of each token in the
        padded text, EMPTY for padding, and its position for RoPE.
        """
        fresh = len(self) == 0
        self._append(keys, values, positions, where)
        known, stored = self.keys.read(self.where), self.values.read(self.where)
        picked = self._picked(query)
        at = self.positions
        if picked is not None:
            known, stored, at = gather(known, picked), gather(stored, picked), gather(at.expand(-1, known.shape[1], -1), picked)
        padded = bool((at < 0).any())
        causal = (fresh or query.shape[2] == 1) and not padded
        inside = rule.window is None or len(self) <= rule.window
        seen = None if causal and inside else visible(at, positions, rule.window)
        out, attention = attend(query, known, stored, seen, rule)
        step = Step(self.layer, self.head, query, known, stored, self.positions, positions, where, first, rule, prefill, decoded,
                    attention if picked is None else None)  # fmt: skip
        if self.stack.evictor:
            self.statistics = self.stack.evictor.observe(step, self.statistics)
        return out, step

    def slide(self, newest: int, window: int) -> None:
        """Forget what no query after position `newest` can see."""
        self._empty((self.positions <= newest + 1 - window) & self._movable())

    def evict(self, step: Step, capacity: Tensor) -> None:
        """Empty slots down to what the policy keeps of a capacity int [B]."""
        evictor = self.stack.evictor
        if evictor is None or len(self) <= int(capacity.min()):
            return
        held = (self.positions >= 0).sum(-1)
        targets = torch.tensor([evictor.target(int(c), step.prefill) for c in capacity], device=held.device)
        excess = torch.where(held > capacity[:, None], held - targets[:, None], 0)
        if int(excess.max()) <= 0:
            return
        recent = torch.tensor([min(evictor.recent(int(t)), int(t) - evictor.sinks) for t in targets], device=held.device)
        score = evictor.score(step, self.statistics)
        positions = self.positions if self.positions.shape[1] == score.shape[1] else self.positions.expand(-1, score.shape[1], -1)
        newest = int(step.queries.max())
        score = protect(score, positions, step.first, evictor.sinks, newest - recent)
        self.positions = positions.clone() if positions is self.positions else positions.contiguous()
        fixed = ~self._movable() & (positions >= 0)
        self._empty(drop_lowest(score.masked_fill(fixed, torch.inf), excess.expand(*score.shape[:2])))

    def store(self, step: Step) -> None:
        """Give back empty slots; store what is old enough in the form that the policies give it."""
        self._compact()
        step = replace(step, positions=self.positions)
        empty = self.positions < 0
        for tape in (self.keys, self.values):
            tape.store(step, self.where, empty if bool(empty.any()) else None)

    def crop(self, count: int) -> None:
        """Forget the last tokens, where nothing was dropped or stored."""
        for tape in self._tapes():
            tape.crop(count)
        left = len(self)
        self.positions, self.where = self.positions[..., :left], self.where[:, :left]
        self.statistics = tuple(s[..., :left] for s in self.statistics)

    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch, with all that was counted for them."""
        for tape in self._tapes():
            tape.rows(index)
        place = index.to(self.positions.device)
        self.positions, self.where = self.positions[place], self.where[place]
        self.statistics = tuple(s[place] for s in self.statistics)

    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""
        for tape in self._tapes():
            yield from tape.tensors()
        yield from (self.positions, self.where, *self.statistics)

    def _append(self, keys: Tensor, values: Tensor, positions: Tensor, where: Tensor) -> None:
        pads = (positions < 0)[:, None, :, None]
        if pads.any():
            keys, values = keys.masked_fill(pads, 0), values.masked_fill(pads, 0)
        fresh = len(self) == 0
        self.keys.append(keys)
        self.values.append(values)
        if self.labels is not None and self.stack.reader:
            self.labels.append(self.stack.reader.labels(keys, self.layer, self.head))
        new = positions[:, None].to(torch.int32)
        self.positions = new if fresh else torch.cat([self.positions, new.expand(-1, self.positions.shape[1], -1)], 2)
        where = where.to(torch.int32) if self._positional else where[:, :0].to(torch.int32)
        self.where = where if fresh else torch.cat([self.where, where], 1)
        count = self.stack.evictor.statistics if self.stack.evictor else 0
        zeros = keys.new_zeros(*keys.shape[:3], dtype=torch.float32)
        self.statistics = (zeros,) * count if fresh else tuple(torch.cat([s, zeros], 2) for s in self.statistics)

    def _picked(self, query: Tensor) -> Tensor | None:
        if self.labels is None or self.stack.reader is None or query.shape[2] > 1:
            return None
        return self.stack.reader.pick(query, self.labels.read(self.where), self.positions, self.layer, self.head)

    def _boundary(self) -> int:
        """Slots before it may go: once some are stored, only those stored both as key and as value."""
        if not (self.keys.old or self.values.old):
            return len(self)
        return min(t.old if t.side else len(self) for t in (self.keys, self.values))

    def _movable(self) -> Tensor:
        return torch.arange(len(self), device=self.positions.device) < self._boundary()

    def _empty(self, gone: Tensor) -> None:
        self.positions = self.positions.masked_fill(gone, EMPTY)

    def _compact(self) -> None:
        """Give back as many slots as are empty in every row and head."""
        end = self._boundary()
        empty = self.positions[..., :end] < 0
        most = int((~empty).sum(-1).max())
        if most == end:
            return
        # stored tapes take the oldest slots first, so their order matters
        if end - most == 1 and not (self.keys.side or self.values.side):
            self._swap(empty.int().argmax(-1))
            return
        behind = torch.arange(end, len(self), device=empty.device).expand(*empty.shape[:2], -1)
        index = torch.cat([empty.int().argsort(dim=-1, stable=True)[..., :most], behind], -1)
        for tape in self._tapes():
            tape.keep(index)
        self.positions = gather(self.positions, index)
        self.statistics = tuple(gather(s, index) for s in self.statistics)
        if self._positional:
            self.where = self.where.gather(1, index[:, 0])

    def _swap(self, slot: Tensor) -> None:
        for tape in self._tapes():
            tape.move_last(slot)
        moved = []
        for x in (self.positions, *self.statistics):
            place = slot[..., None].expand(-1, x.shape[1], -1)
            moved.append(x.scatter(2, place, x[:, :, -1:])[:, :, :-1].contiguous())
        self.positions, *rest = moved
        self.statistics = tuple(rest)

    def _tapes(self) -> Iterator[Tape]:
        yield from (t for t in (self.keys, self.values, self.labels) if t is not None)
