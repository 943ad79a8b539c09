"""One stream of cached tensors, keys or values: older tokens stored by codecs, the latest exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from assay.runtime import single
from assay.runtime.attention import Step
from assay.runtime.codecs import Codec, Map, Plain, Side, Tensors
from assay.runtime.grown import HALVES, Away, Grown, array_of, gather
from assay.runtime.single import Source

DECODED_AT_ONCE = 1 << 18
"""Numbers that are decoded together: they stay in a processor's cache, and take several times the memory while they are."""


class Tape:
    """Slots in the order of their arrival, those of `old` first. Tensors are [B, H, slots, D]."""

    def __init__(self, side: Side | None = None, away: bool = False) -> None:
        self.side, self.away = side, away
        self.old = 0
        self._tokens: dict[str, Grown] = {}
        self._shared: list[Tensors] = []
        self._exact = Away() if away else Grown()
        self._width = 0
        self._source: Source | None = None

    def __len__(self) -> int:
        return self.old + len(self._exact)

    @property
    def exact(self) -> Tensor:
        """The latest slots, stored as they came: [B, H, n, D]."""
        return self._exact.whole()

    @property
    def array(self) -> Any:
        """The latest slots and the room behind them, see `Grown.array`."""
        return self._exact.array

    def append(self, x: Tensor) -> None:
        """Add new tokens, exact."""
        self._exact.append(x)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel for single queries can write x, a token more, to it."""
        return x.device.type == "cpu" and x.dtype == self._exact.data.dtype and (x.dtype == torch.float32 or x.dtype in HALVES)

    def readable(self, weighed: bool = False) -> bool:
        """Whether it reads stored slots as well, to multiply them with a query or to weigh them."""
        simple = not self._maps() if weighed else self._in_heads()
        return not self.old or (simple and self._codec().kind != single.NONE)

    def extended(self, weighed: bool = False) -> Source:
        """What that kernel reads, with a slot more, which it writes."""
        self._exact.extend()
        if self._source is None or self._source.exact is not self._exact.array:
            self._source = self._read() if self.old and self.readable(weighed) else self._unread()
        return self._source

    @property
    def mapped(self) -> bool:
        """Whether stored slots went through maps."""
        return bool(self.side and self.side.maps)

    def inside(self, query: Tensor) -> Tensor:
        """Queries [B, H, g, D] as the kernels multiply them with stored slots."""
        for m, shared in self._maps():
            query = m.dual(query, shared)
        return query.contiguous()

    def read(self, where: Tensor) -> Tensor:
        """All slots [B, H, slots, D]; where: int [B, slots or 1] text positions of them."""
        return torch.cat([*(self._decoded(b, where) for b in self._blocks()), self.exact], 2) if self.old else self.exact

    def take(self, index: Tensor, where: Tensor) -> Tensor:
        """Some slots [B, H, n, D]; index: int [B, H, n]."""
        return gather(self.read(where), index) if self.old else self._exact.take(index)

    def dots(self, query: Tensor, where: Tensor) -> Tensor:
        """query [B, H, g, D] times every slot: [B, H, g, slots]."""
        recent = query @ self.exact.mT
        return torch.cat([self.old_dots(query, where), recent], -1) if self.old else recent

    def old_dots(self, query: Tensor, where: Tensor) -> Tensor:
        """query [B, H, g, D] times every stored slot, which are decoded a block at a time: [B, H, g, old]."""
        maps, inside = self._maps(), self._in_heads()
        for m, shared in maps if inside else ():
            query = m.dual(query, shared)
        if inside:
            parts = [query @ self._codes(b).mT for b in self._blocks()]
        elif len(maps) == 1:
            m, shared = maps[0]
            parts = [m.products(query, self._codes(b), shared, where[:, b]) for b in self._blocks()]
        else:
            parts = [query @ self._decoded(b, where).mT for b in self._blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def mix(self, weights: Tensor, where: Tensor) -> Tensor:
        """Sum of the slots by weights [B, H, g, slots]: [B, H, g, D]."""
        recent = weights[..., self.old :] @ self.exact
        return self.old_mix(weights[..., : self.old], where) + recent if self.old else recent

    def old_mix(self, weights: Tensor, where: Tensor) -> Tensor:
        """Sum of the stored slots by weights [B, H, g, old], decoded a block at a time: [B, H, g, D]."""
        if any(m.positional for m, _ in self._maps()):
            return torch.stack([weights[..., b] @ self._decoded(b, where) for b in self._blocks()]).sum(0)
        parts = []
        for b in self._blocks():
            codes, part = self._codes(b), weights[..., b]
            apart = codes.shape[1] == part.shape[1]
            parts.append(part @ codes if apart else (part.flatten(1, 2)[:, None] @ codes).view(*part.shape[:3], -1))
        found = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        for m, shared in reversed(self._maps()):
            found = m.summed(found, shared)
        return found

    def due(self, step: Step) -> bool:
        """Whether tokens are to be stored now."""
        return self.side is not None and self.side.ready(len(self._exact), step.prefill, step.decoded) > 0

    def store(self, step: Step, where: Tensor, empty: Tensor | None = None) -> None:
        """Move the tokens that are ready from exact to stored; empty: bool [B, H or 1, slots], slots that hold nothing."""
        ready = self.side.ready(len(self._exact), step.prefill, step.decoded) if self.side else 0
        if not ready or self.side is None:
            return
        if empty is not None:
            self.exact.masked_fill_(empty[:, :, self.old :, None], 0)
        x = self.exact[:, :, :ready]
        part = where[:, self.old : self.old + ready]
        if not self._shared:
            self._shared = self._fit(step, where)
        for m, shared in self._maps():
            x = m.forward(x, shared, part)
        self._width = x.shape[-1]
        tokens, self._shared[-1] = self._codec().encode(x, self._shared[-1])
        for name, t in tokens.items():
            self._tokens.setdefault(name, Grown()).append(t)
        self.old += ready
        self._source = None
        self._exact.drop_first(ready)

    def keep(self, index: Tensor) -> None:
        """Keep these slots only: int [B, H or 1, n]; what is exact behind stored slots must be kept as it is."""
        self._source = None
        if not self.old:
            self._exact.keep(index)
            return
        old = index[..., : index.shape[-1] - len(self._exact)]
        for grown in self._tokens.values():
            grown.keep(old)
        self.old = old.shape[-1]

    def move_last(self, slot: Tensor) -> None:
        """Put the last slot where `slot` [B, H or 1, 1] is and forget the last; for tapes without stored slots."""
        self._exact.move_last(slot)

    def crop(self, count: int) -> None:
        """Forget the last slots, which must be exact."""
        self._exact.crop(count)

    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch."""
        self._source = None
        for grown in (*self._tokens.values(), self._exact):
            grown.rows(index)
        self._shared = [{n: t[index.to(t.device)] for n, t in s.items()} for s in self._shared]

    def bytes_per_slot(self, half: bool = False) -> float:
        """Bytes of a slot of all rows and heads in the form in which older ones are stored, shared scales included.

        half: as in a model of 16 bits, whatever this one has.
        """
        if not self.old:
            return _bytes(self.exact[:, :, :1], half)
        grown = [t for shared in self._shared[-1:] for t in shared.values()]
        return sum(_bytes(t, half) for t in [*(x.view for x in self._tokens.values()), *grown]) / self.old

    def fixed_bytes(self, half: bool = False) -> float:
        """Bytes of what maps know of all rows and heads, which doesn't grow."""
        return sum(_bytes(t, half) for shared in self._shared[:-1] for t in shared.values())

    def tensors(self) -> Iterator[Tensor]:
        """Everything held."""
        yield from (grown.data for grown in (self._exact, *self._tokens.values()))
        for shared in self._shared:
            yield from shared.values()

    def _unread(self) -> Source:
        half = HALVES.get(self._exact.data.dtype, -1)
        return Source._make((self._exact.array, *single.EMPTY[half >= 0], single.NONE, 0, half, 0, self.old, self._width))

    def _read(self) -> Source:
        half, codec, shared = HALVES.get(self._exact.data.dtype, -1), self._codec(), self._shared[-1]
        held: dict[str, Any] = {name: array_of(t) for name, t in shared.items()}
        held |= {name: grown.array for name, grown in self._tokens.items()}
        named = [held.get(name, empty) for name, empty in zip(single.FIELDS, single.EMPTY[half >= 0], strict=True)]
        scale = self._tokens["scale"].data if "scale" in self._tokens else shared.get("scale")
        coded = 0 if scale is None else HALVES[scale.dtype]
        return Source._make((self._exact.array, *named, codec.kind, codec.bits, half, coded, self.old, self._width))

    def _blocks(self) -> Iterator[slice]:
        """Stored slots, so many at a time that their numbers stay in a processor's cache."""
        size = max(DECODED_AT_ONCE // (self.exact.shape[0] * self.exact.shape[1] * self.exact.shape[3]), 64)
        yield from (slice(start, min(start + size, self.old)) for start in range(0, self.old, size))

    def _codes(self, block: slice) -> Tensor:
        """Stored slots as the codec gives them, before the maps."""
        tokens = {name: grown.view[:, :, block] for name, grown in self._tokens.items()}
        return self._codec().decode(tokens, self._shared[-1], self._width, self._exact.data.dtype)

    def _decoded(self, block: slice, where: Tensor) -> Tensor:
        """Stored slots as they came."""
        found = self._codes(block)
        for m, shared in reversed(self._maps()):
            found = m.backward(found, shared, where[:, block])
        return found

    def _in_heads(self) -> bool:
        """Whether the maps treat all tokens of a head alike, so that they can be applied to the query instead."""
        return not any(m.positional or m.joint for m, _ in self._maps())

    def _maps(self) -> list[tuple[Map, Tensors]]:
        return list(zip(self.side.maps, self._shared, strict=False)) if self.side else []

    def _codec(self) -> Codec:
        return (self.side.codec if self.side else None) or Plain()

    def _fit(self, step: Step, where: Tensor) -> list[Tensors]:
        x, found = self.exact, []
        for m in self.side.maps if self.side else ():
            found.append(m.fit(x, step))
            x = m.forward(x, found[-1], where)
        return [*found, {}]


def _bytes(x: Tensor, half: bool) -> int:
    return x.numel() * (2 if half and x.dtype == torch.float32 else x.element_size())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once: views and zeroed channels are no savings."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())
