"""One stream of cached tensors, keys or values: older tokens stored by codecs, the latest exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from assay.runtime.attention import Step
from assay.runtime.codecs import Codec, Map, Plain, Side, Tensors

ROOM = 32
"""Slots that a tape grows by when single tokens come."""
DECODED_AT_ONCE, LEAST_AT_ONCE = 1 << 17, 64
"""Numbers that are decoded together, and slots at least."""


class Tape:
    """Slots in the order of their arrival, those of `old` first. Tensors are [B, H, slots, D]."""

    def __init__(self, side: Side | None = None) -> None:
        self.side = side
        self.old = 0
        self._tokens: Tensors = {}
        self._shared: list[Tensors] = []
        self._exact = torch.empty(0)
        self._count = 0
        self._width = 0

    def __len__(self) -> int:
        return self.old + self._count

    @property
    def exact(self) -> int:
        """Slots that are stored as they came."""
        return self._count

    def append(self, x: Tensor) -> None:
        """Add new tokens, exact."""
        need = self._count + x.shape[2]
        if self._exact.ndim != 4 or need > self._exact.shape[2]:
            size = need + (ROOM if self._count else 0)
            grown = x.new_empty(*x.shape[:2], size, x.shape[3])
            if self._count:
                grown[:, :, : self._count] = self._exact[:, :, : self._count]
            self._exact = grown
        self._exact[:, :, self._count : need] = x
        self._count = need

    def read(self, where: Tensor) -> Tensor:
        """All slots [B, H, slots, D]; where: int [B, slots or 1] text positions of them."""
        recent = self._exact[:, :, : self._count]
        if not self.old:
            return recent
        first = self._decoded(where, 0, self._at_once())
        if first.shape[2] == self.old:
            return torch.cat([first, recent], 2)
        # in parts, because decoding takes several times the memory of its result
        whole = first.new_empty(*first.shape[:2], len(self), first.shape[3])
        whole[:, :, : first.shape[2]] = first
        for start in range(first.shape[2], self.old, first.shape[2]):
            part = self._decoded(where, start, start + first.shape[2])
            whole[:, :, start : start + part.shape[2]] = part
        whole[:, :, self.old :] = recent
        return whole

    def _decoded(self, where: Tensor, start: int, stop: int) -> Tensor:
        """Stored slots from `start` to `stop`, [B, H, slots, D]."""
        stop = min(stop, self.old)
        tokens = {name: t[:, :, start:stop] for name, t in self._tokens.items()}
        x = self._codec().decode(tokens, self._shared[-1], self._width, self._exact.dtype)
        for m, shared in reversed(self._maps()):
            x = m.backward(x, shared, where[:, start:stop])
        return x

    def _at_once(self) -> int:
        """Slots that are decoded together."""
        rows, heads, _, width = self._exact.shape
        return max(LEAST_AT_ONCE, DECODED_AT_ONCE // (rows * heads * width))

    def store(self, step: Step, where: Tensor, empty: Tensor | None = None) -> None:
        """Move the tokens that are ready from exact to stored; empty: bool [B, H or 1, slots], slots that hold nothing."""
        ready = self.side.ready(self._count, step.prefill) if self.side else 0
        if not ready or self.side is None:
            return
        if empty is not None:
            self._exact[:, :, : self._count].masked_fill_(empty[:, :, self.old :, None], 0)
        x = self._exact[:, :, :ready]
        part = where[:, self.old : self.old + ready]
        if not self._shared:
            self._shared = self._fit(step, where)
        for m, shared in self._maps():
            x = m.forward(x, shared, part)
        self._width = x.shape[-1]
        tokens, self._shared[-1] = self._codec().encode(x, self._shared[-1])
        if self.old:
            tokens = {n: torch.cat([self._tokens[n], t.to(self._tokens[n].dtype)], 2) for n, t in tokens.items()}
        # a view would keep the exact tokens alive
        self._tokens = {n: t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for n, t in tokens.items()}
        self.old += ready
        self._exact = self._exact[:, :, ready : self._count].clone()
        self._count -= ready

    def keep(self, index: Tensor) -> None:
        """Keep these slots only: int [B, H or 1, n]; what is exact behind stored slots must be kept as it is."""
        if not self.old:
            self._exact = gather(self._exact, index)
            self._count = index.shape[-1]
            return
        old = index[..., : index.shape[-1] - self._count]
        self._tokens = {name: gather(t, old) for name, t in self._tokens.items()}
        self.old = old.shape[-1]

    def move_last(self, slot: Tensor) -> None:
        """Put the last slot where `slot` [B, H or 1] is and forget the last; for tapes without stored slots."""
        last = self._exact[:, :, self._count - 1 : self._count]
        self._exact.scatter_(2, slot[..., None, None].expand_as(last), last.clone())
        self._count -= 1

    def crop(self, count: int) -> None:
        """Forget the last slots, which must be exact."""
        self._count -= count

    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch."""
        self._tokens = {n: t[index.to(t.device)] for n, t in self._tokens.items()}
        self._shared = [{n: t[index.to(t.device)] for n, t in s.items()} for s in self._shared]
        if self._count or self._exact.ndim == 4:
            self._exact = self._exact[index.to(self._exact.device)]

    def bytes_per_slot(self, half: bool = False) -> float:
        """Bytes of a slot of all rows and heads in the form in which older ones are stored, shared scales included.

        half: as in a model of 16 bits, whatever this one has.
        """
        if not self.old:
            return _bytes(self._exact[:, :, :1], half)
        grown = [t for shared in self._shared[-1:] for t in shared.values()]
        return sum(_bytes(t, half) for t in [*self._tokens.values(), *grown]) / self.old

    def fixed_bytes(self, half: bool = False) -> float:
        """Bytes of what maps know of all rows and heads, which doesn't grow."""
        return sum(_bytes(t, half) for shared in self._shared[:-1] for t in shared.values())

    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""
        yield self._exact
        yield from self._tokens.values()
        for shared in self._shared:
            yield from shared.values()

    def _maps(self) -> list[tuple[Map, Tensors]]:
        return list(zip(self.side.maps, self._shared, strict=False)) if self.side else []

    def _codec(self) -> Codec:
        return (self.side.codec if self.side else None) or Plain()

    def _fit(self, step: Step, where: Tensor) -> list[Tensors]:
        x, found = self._exact[:, :, : self._count], []
        for m in self.side.maps if self.side else ():
            found.append(m.fit(x, step))
            x = m.forward(x, found[-1], where)
        return [*found, {}]


def _bytes(x: Tensor, half: bool) -> int:
    return x.numel() * (2 if half and x.dtype == torch.float32 else x.element_size())


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Slots of [B, H or 1, S, ...] by index [B, H or 1, n], in a tensor of its own."""
    if x.shape[1] == 1:
        index = index[:, :1]
    index = index.expand(x.shape[0], x.shape[1], -1)
    return x.gather(2, index.reshape(*index.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:]))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once: views and zeroed channels are no savings."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())
