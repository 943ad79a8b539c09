"""The cache of some heads of one layer that keep equally many tokens: tapes, positions, and what a policy counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from assay.runtime.attention import EMPTY, Rule, Step, attend, capped, grouped, softmaxed, visible
from assay.runtime.grown import Grown, gather
from assay.runtime.picked import attend_picked
from assay.runtime.policy import Evictor, Stack
from assay.runtime.select import drop_lowest, protect
from assay.runtime.single import ALL, Sight, attend_one
from assay.runtime.slots import lowest, replace_lowest
from assay.runtime.tape import Tape


@dataclass(frozen=True)
class Arrival:
    """What is known of new tokens before a lane sees them.

    positions int [B, L]: slot of each in the padded text, EMPTY for padding; where int [B, L]: its position for RoPE;
    first int [B]: position of the first token of each row; padded: whether any is padding; newest: the latest position;
    prefill, decoded: see `Step`.
    """

    positions: Tensor
    where: Tensor
    first: Tensor
    padded: bool
    newest: int
    prefill: bool
    decoded: int


class Lane:
    """Slots of the key heads `head` to `head + heads` of a layer.

    `holes`: some slot may be empty in some row or head, because of padding or because others hold more.
    """

    def __init__(self, stack: Stack, layer: int, head: int) -> None:
        self.stack, self.layer, self.head = stack, layer, head
        keys, values = stack.sides(layer)
        away = stack.reader is not None and stack.reader.away(layer)
        self.keys, self.values = Tape(keys, away), Tape(values, away)
        self.labels = Tape() if stack.reader else None
        self.holes = False
        self._positions, self._where = Grown(), Grown()
        self._counted = [Grown() for _ in range(stack.evictor.statistics if stack.evictor else 0)]
        self._positional = any(m.positional for side in (keys, values) if side for m in side.maps)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def positions(self) -> Tensor:
        """Position of each slot, int32 [B, H or 1, S], EMPTY where there is none."""
        return self._positions.view

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """What the policy counts, float32 [B, H, S] each."""
        return tuple(s.view for s in self._counted)

    def step(self, query: Tensor, keys: Tensor, values: Tensor, new: Arrival, rule: Rule) -> tuple[Tensor, Step]:
        """Append new tokens and attend: output [B, Hq, L, D], and what the policy may look at.

        query [B, Hq, L, D]; keys, values [B, H, L, D] after RoPE.
        """
        fresh, one = len(self) == 0, query.shape[2] == 1
        if new.padded:
            pads = (new.positions < 0)[:, None, :, None]
            keys, values = keys.masked_fill(pads, 0), values.masked_fill(pads, 0)
            self.holes = True
        compiled = one and not fresh and self._compiled(query, keys, values)
        newest = new.newest if compiled and self.labels is None and not new.padded else EMPTY
        self._note(keys, new, newest)
        picked = self._picked(query) if one else None
        found = attention = None
        causal = (fresh or one) and not self.holes
        inside = rule.window is None or len(self) <= rule.window
        if compiled and picked is None:
            out, found, attention = self._at_once(query, keys, values, new, newest, rule, causal and inside)
        elif compiled and picked is not None and not (self.stack.evictor or self.keys.old or self.values.old):
            sight = self._sight(new, newest, rule, causal and inside)
            read = self.keys.extended(), self.values.extended(True)
            out = attend_picked(query.float().contiguous(), picked, sight, keys, values, *read, len(self)).to(query.dtype)
        else:
            self.keys.append(keys)
            self.values.append(values)
            seen = None if causal and inside else visible(self.positions, new.positions, rule.window)
            if one:
                out, found, attention = self._single(query, seen, rule, picked)
            else:
                keys, values = self.keys.read(self._places), self.values.read(self._places)
                out = attend(query, keys, values, seen, rule)
        step = Step(self.layer, self.head, query, keys, values, self.positions, new.positions, new.where, new.first, rule,
                    new.prefill, new.decoded, new.newest, found, attention, one and causal and inside)  # fmt: skip
        if self.stack.evictor and self._counted:
            past = self.statistics
            for held, now in zip(past, self.stack.evictor.observe(step, past), strict=True):
                if now is not held:
                    held.copy_(now)
        elif self.stack.evictor:
            self.stack.evictor.observe(step, ())
        return out, step

    def slide(self, newest: int, window: int) -> None:
        """Forget what no query after position `newest` can see."""
        if newest + 1 < window:
            return
        gone = self.positions <= newest + 1 - window
        if not (self.holes or self._coded()) and bool((gone.sum(-1) == 1).all()):
            self._move_last(gone.int().argmax(-1, keepdim=True))
        elif bool(gone.any()):
            self._empty(gone & self._movable())

    def evict(self, step: Step, capacity: Sequence[int]) -> None:
        """Empty slots down to what the policy keeps of a capacity for each row."""
        evictor, length = self.stack.evictor, len(self)
        if evictor is None or length <= min(capacity):
            return
        targets = [evictor.target(c, step.prefill) for c in capacity]
        if not self.holes and len({*targets}) == 1 and length - targets[0] == 1 and not self._coded():
            self._replace(evictor, step, targets[0])
            return
        device = self.positions.device
        held = (self.positions >= 0).sum(-1)
        excess = torch.where(held > torch.tensor(capacity, device=device)[:, None],
                             held - torch.tensor(targets, device=device)[:, None], 0)  # fmt: skip
        if int(excess.max()) <= 0:
            return
        recent = torch.tensor([_recent(evictor, t) for t in targets], device=device)
        score = evictor.score(step, self.statistics)
        self._widen(score.shape[1])
        score = protect(score, self.positions, step.first, evictor.sinks, step.newest - recent)
        fixed = ~self._movable() & (self.positions >= 0)
        self._empty(drop_lowest(score.masked_fill(fixed, torch.inf), excess.expand(*score.shape[:2])))

    def store(self, step: Step) -> None:
        """Give back empty slots; store what is old enough in the form that the policies give it."""
        if self.holes:
            self._compact()
        for tape in (self.keys, self.values):
            if tape.due(step):
                empty = self.positions < 0 if self.holes else None
                tape.store(replace(step, positions=self.positions), self._places, empty)

    def crop(self, count: int) -> None:
        """Forget the last tokens, where nothing was dropped or stored."""
        for tape in self._tapes():
            tape.crop(count)
        for grown in self._beside():
            grown.crop(count)

    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch, with all that was counted for them."""
        for tape in self._tapes():
            tape.rows(index)
        for grown in self._beside():
            grown.rows(index)

    def tensors(self, away: bool = False) -> Iterator[Tensor]:
        """Everything held where the model computes, or what is kept away from there."""
        for tape in self._tapes():
            if tape.away == away:
                yield from tape.tensors()
        if away:
            return
        yield from (grown.data for grown in self._beside())

    @property
    def _places(self) -> Tensor:
        """Positions for RoPE, int [B, S], where a map reads them; else none."""
        return self._where.view[:, 0] if self._positional else self.positions[:, 0, :0]

    def _compiled(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        free = not (torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad))
        return free and self.keys.takes(keys) and self.values.takes(values)

    def _at_once(self, query: Tensor, keys: Tensor, values: Tensor, new: Arrival, newest: int, rule: Rule, seen: bool
                 ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Append and attend as `_single`, compiled; logits and attention only where a policy may ask. seen: all slots are."""
        (rows, heads), group, old = values.shape[:2], query.shape[1] // values.shape[1], self.keys.old
        asked, inside = query.float().contiguous(), None
        attention = np.empty((rows, heads, group, len(self)), np.float32)
        found = np.empty(attention.shape if self._counted else (rows, heads, group, 0), np.float32)
        if old:
            folded = asked.view(rows, heads, group, -1)
            if not self.keys.readable():
                attention[..., :old] = self.keys.old_dots(folded.to(query.dtype), self._places).float().numpy()
            elif self.keys.mapped:
                inside = self.keys.inside(folded).view(rows, query.shape[1], 1, -1)
        sight, read = self._sight(new, newest, rule, seen), (self.keys.extended(), self.values.extended(True))
        out = attend_one(asked, inside, sight, keys, values, *read, attention, found)
        if self.values.old and not self.values.readable(True):
            weights = torch.from_numpy(attention[..., : self.values.old]).to(query.dtype)
            out += self.values.old_mix(weights, self._places).view_as(out)
        if not self.stack.evictor:
            return out.to(query.dtype), None, None
        logits, weights = (torch.from_numpy(x)[:, :, :, None] for x in (found, attention))
        return out.to(query.dtype), logits if self._counted else None, weights

    def _sight(self, new: Arrival, newest: int, rule: Rule, seen: bool) -> Sight:
        asked = ALL if seen else new.positions[:, 0].contiguous().numpy()
        return Sight(asked, self._positions.array, newest, rule.window or 0, rule.scaling, rule.softcap or 0.0)

    def _picked(self, query: Tensor) -> Tensor | None:
        if self.labels is None or self.stack.reader is None:
            return None
        return self.stack.reader.pick(query, self.labels.exact, self.positions, self.layer, self.head)

    def _single(self, query: Tensor, seen: Tensor | None, rule: Rule, picked: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, Hq, 1, D] of one query, its logits and its attention; what it doesn't read gets none."""
        folded = grouped(query, self.keys.exact.shape[1])[:, :, :, 0] * rule.scaling
        if picked is None:
            found = capped(self.keys.dots(folded, self._places).float(), rule)[:, :, :, None]
            attention = softmaxed(found, seen)
            out = self.values.mix(attention[:, :, :, 0].to(query.dtype), self._places)
            return out.flatten(1, 2)[:, :, None], found, attention
        keys, values = (t.take(picked, self._places) for t in (self.keys, self.values))
        found = capped((folded @ keys.mT).float(), rule)[:, :, :, None]
        if seen is not None:
            seen = gather(seen[:, :, 0].expand(-1, keys.shape[1], -1), picked)[:, :, None]
        attention = softmaxed(found, seen)
        out = attention[:, :, :, 0].to(query.dtype) @ values
        if self.stack.evictor:
            place = picked[:, :, None, None].expand_as(found)
            whole = found.new_full((*found.shape[:-1], len(self)), torch.finfo(found.dtype).min)
            found, attention = whole.scatter(4, place, found), torch.zeros_like(whole).scatter_(4, place, attention)
        return out.flatten(1, 2)[:, :, None], found, attention

    def _note(self, keys: Tensor, new: Arrival, newest: int) -> None:
        """Append all that is known of new tokens besides their keys and values; of the newest the kernel writes the position."""
        if self.labels is not None and self.stack.reader:
            self.labels.append(self.stack.reader.labels(keys, self.layer, self.head))
        one = len(self) and keys.shape[2] == 1
        if newest >= 0:
            self._positions.extend()
        elif one and not new.padded:
            self._positions.fill(new.newest)
        else:
            positions = new.positions[:, None].to(torch.int32)
            self._positions.append(positions.expand(-1, self.positions.shape[1], -1) if len(self) else positions)
        if self._positional and one and keys.device.type == "cpu":
            self._where.extend()
            self._where.array[:, 0, len(self._where) - 1] = new.where[:, 0].numpy()
        elif self._positional:
            self._where.append(new.where[:, None].to(torch.int32))
        for grown in self._counted:
            if one:
                grown.fill(0)
            else:
                grown.append(keys.new_zeros(*keys.shape[:3], dtype=torch.float32))

    def _replace(self, evictor: Evictor, step: Step, target: int) -> None:
        """Put the newest token where the one that goes was; every row and head holds one too many."""
        score = evictor.score(step, self.statistics)
        self._widen(score.shape[1])
        after = step.newest - _recent(evictor, target)
        place = self._positions.array, step.first, evictor.sinks, after
        if score.device.type == "cpu" and self.labels is None and not self._positional:
            slot = replace_lowest(score, *place, self.keys.array, self.values.array)
            for held in (self.keys, self.values, self._positions):
                held.crop(1)
            for grown in self._counted:
                grown.move_last(slot)
            return
        if score.device.type == "cpu":
            self._move_last(lowest(score, *place))
            return
        score = protect(score, self.positions, step.first, evictor.sinks, after, False)
        self._move_last(score.argmin(-1, keepdim=True))

    def _move_last(self, slot: Tensor) -> None:
        for tape in self._tapes():
            tape.move_last(slot)
        for grown in self._beside():
            grown.move_last(slot)

    def _coded(self) -> bool:
        return bool(self.keys.side or self.values.side)

    def _boundary(self) -> int:
        """Slots before it may go: once some are stored, only those stored both as key and as value."""
        if not (self.keys.old or self.values.old):
            return len(self)
        return min(t.old if t.side else len(self) for t in (self.keys, self.values))

    def _movable(self) -> Tensor:
        return torch.arange(len(self), device=self.positions.device) < self._boundary()

    def _widen(self, heads: int) -> None:
        """Positions for every head where a policy keeps other tokens in each."""
        if self.positions.shape[1] != heads:
            self._positions.put(self.positions.expand(-1, heads, -1).contiguous())

    def _empty(self, gone: Tensor) -> None:
        self._positions.put(self.positions.masked_fill(gone, EMPTY))
        self.holes = True

    def _compact(self) -> None:
        """Give back as many slots as are empty in every row and head."""
        end = self._boundary()
        empty = self.positions[..., :end] < 0
        most = int((~empty).sum(-1).max())
        if most < end:
            # stored tapes take the oldest slots first, so the order of slots matters
            behind = torch.arange(end, len(self), device=empty.device).expand(*empty.shape[:2], -1)
            index = torch.cat([empty.int().argsort(dim=-1, stable=True)[..., :most], behind], -1)
            for tape in self._tapes():
                tape.keep(index)
            for grown in self._beside():
                grown.keep(index)
        self.holes = bool((self.positions < 0).any())

    def _tapes(self) -> Iterator[Tape]:
        yield from (t for t in (self.keys, self.values, self.labels) if t is not None)

    def _beside(self) -> Iterator[Grown]:
        yield from (self._positions, *self._counted, *([self._where] if self._positional else []))


def _recent(evictor: Evictor, target: int) -> int:
    return min(evictor.recent(target), target - evictor.sinks)
