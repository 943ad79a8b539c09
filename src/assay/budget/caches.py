"""What keys and values may become: priced levels of every layer, and for an engine the choices worth having in bytes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.budget.serving import Load
from assay.engines.serving import CacheType, Server, server
from assay.measure.footprint import Footprint
from assay.model.errors import InputError
from assay.model.files import read_note, save_note
from assay.runtime.grown import ROOM, SHARE

FILE = "cache.json"
EXACT, ALL = "exact", "fp16"
HALF = 2
MOST_POINTS = 512


@dataclass(frozen=True)
class CachePrice:
    """One layer's keys, values, or share of tokens kept at one level; layer None: all layers at once.

    side: "keys", "values", "both" or "tokens"; bytes_per_token: of one sequence in a model of 16 bits, scales included, of
    "tokens" what a kept token takes beside its key and value; nats: measured KL per token when nothing else is changed;
    waiting: latest tokens that stay exact; fixed: bytes a sequence that don't grow; once: bytes for all sequences together.
    """

    layer: int | None
    side: str
    level: str
    bytes_per_token: float
    nats: float
    waiting: int = 0
    fixed: int = 0
    once: int = 0


@dataclass(frozen=True)
class Stored:
    """How one layer holds its cache: types of keys and of values, and the share of tokens that stays."""

    keys: str = ALL
    values: str = ALL
    share: float = 1.0

    def __str__(self) -> str:
        kept = "" if self.share == 1 else f" {self.share:g}"
        return f"{self.keys} {self.values}{kept}"

    @classmethod
    def parse(cls, text: str) -> Stored:
        """ "KEYS VALUES" or "KEYS VALUES SHARE". Raises InputError."""
        parts = str(text).split()
        try:
            share = float(parts[2]) if len(parts) == 3 else 1.0
        except ValueError:
            share = math.nan
        if len(parts) not in (2, 3) or not 0 < share <= 1:
            raise InputError(
                f"cache {text!r}: write the types of keys and values, and the share of tokens kept, like fp8 kivi4 0.5"
            )
        return cls(parts[0], parts[1], share)


@dataclass(frozen=True)
class CacheChoice:
    """A cache for all layers. evict: the policy that drops tokens; nbytes: at a context and batch; nats: predicted loss."""

    layers: tuple[Stored, ...]
    evict: str | None
    nbytes: int
    nats: float

    @property
    def lossless(self) -> bool:
        """Whether nothing is stored smaller."""
        return all(s == Stored() for s in self.layers)

    @property
    def types(self) -> tuple[str, str]:
        """Types of keys and of values in the first layer, which are those of all where the engine has one."""
        return self.layers[0].keys, self.layers[0].values

    @property
    def title(self) -> str:
        """See `kinds`."""
        return kinds(self.layers)


def kinds(layers: Sequence[Stored]) -> str:
    """The type of a cache, KEYS/VALUES, or how many layers have which."""
    words = [
        f"{s.keys if s.keys == s.values else f'{s.keys}/{s.values}'}{'' if s.share == 1 else f' {s.share:g}'}" for s in layers
    ]
    used = sorted({*words}, key=lambda k: (-words.count(k), k))
    return used[0] if len(used) == 1 else ", ".join(f"{words.count(k)} x {k}" for k in used)


def save(folder: Path, prices: Iterable[CachePrice], facts: Mapping[str, Any]) -> None:
    """Write prices into the folder of a profile. facts: what they were measured on."""
    save_note(folder / FILE, {"facts": dict(facts), "prices": [dataclasses.asdict(p) for p in prices]})


def load(folder: Path) -> list[CachePrice] | None:
    """The prices in the folder of a profile, None where there are none. Raises InputError for damaged ones."""
    if not (folder / FILE).exists():
        return None
    try:
        return [CachePrice(**p) for p in read_note(folder / FILE, "no prices of caches")["prices"]]
    except (KeyError, TypeError):
        raise InputError(f"{folder / FILE} is of another assay; remove it and run assay profile --cache again") from None


@dataclass(frozen=True)
class CacheMenu:
    """What one engine may hold of a model's cache at a context and batch.

    prices: by (layer, side, level), layer None where an engine has one type for all layers; types: by the engine's names.
    """

    engine: str
    footprint: Footprint
    load: Load
    prices: Mapping[tuple[int | None, str, str], CachePrice]
    types: Mapping[str, CacheType]

    @classmethod
    def of(cls, prices: Sequence[CachePrice], footprint: Footprint, load: Load, engine: str) -> CacheMenu:
        """Raises InputError for an engine that isn't known."""
        by = server(engine)
        table = {(p.layer, p.side, p.level): p for p in prices}
        types = {c.name: c for c in by.caches}
        if by.alike == "none":
            own = dict.fromkeys(p.level for p in prices if p.layer is not None and p.side in ("keys", "values"))
            types |= {name: CacheType(name, types[ALL].bits, name, name) for name in own if name != EXACT}
        return cls(engine, footprint, load, table, types)

    @property
    def server(self) -> Server:
        """The engine."""
        return server(self.engine)

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.footprint.layers)

    def shares(self, evict: str | None) -> list[float]:
        """Shares of tokens that a policy was priced at, 1 among them. Raises InputError where it can't be had."""
        if evict is None:
            return [1.0]
        if self.server.alike != "none":
            raise InputError(f"--evict {evict}: {self.engine} drops no tokens; --engine assay does")
        found = {p.level.rpartition(" ") for p in self.prices.values() if p.side == "tokens"}
        shares = sorted({float(share) for name, _, share in found if name == evict}, reverse=True)
        if not shares:
            known = ", ".join(sorted({name for name, _, _ in found if name})) or "none"
            raise InputError(f"--evict {evict}: the profile has prices for {known}")
        return [1.0, *shares]

    def uniform(self, evict: str | None = None) -> list[CacheChoice]:
        """Every single choice for all layers, those of the engine's flags, that was priced."""
        pairs = [(t, t) for t in self.types] if self.server.alike != "sides" else list(itertools.product(self.types, repeat=2))
        made = []
        for (keys, values), share in itertools.product(pairs, self.shares(evict)):
            one = Stored(keys, values, share)
            if all(self._known(i, one, evict) for i in range(self.depth)):
                made.append(self.choice([one] * self.depth, evict))
        return made

    def choices(self, evict: str | None = None) -> list[CacheChoice]:
        """Choices by rising bytes, each with less loss than every smaller one; of the engine's own mixture of layers.

        All that are worth having while they are at most `MOST_POINTS`; beyond that those nearest to even steps of bytes.
        """
        if self.server.alike != "none":
            return _front(self.uniform(evict), lambda c: (c.nbytes, c.nats))
        front: list[tuple[int, float, tuple[Stored, ...]]] = [(0, 0.0, ())]
        policies = [None] if evict is None else [None, evict]
        made: list[CacheChoice] = []
        for policy in policies:
            front = [(0, 0.0, ())]
            for layer in range(self.depth):
                options = _front(self._options(layer, policy), lambda o: (o[0], o[1]))
                grown = [(a + b, x + y, (*s, t)) for (a, x, s), (b, y, t) in itertools.product(front, options)]
                front = _thinned(_front(grown, lambda o: (o[0], o[1])))
            made += [self.choice(layers, policy) for _, _, layers in front]
        return _front([*made, *self.uniform(evict)], lambda c: (c.nbytes, c.nats))

    def choice(self, layers: Sequence[Stored], evict: str | None) -> CacheChoice:
        """A cache with its bytes and its predicted loss. Raises InputError for what the engine or the prices lack."""
        if len(layers) != self.depth:
            raise InputError(f"the cache of {len(layers)} layers for a model of {self.depth}; give one line a layer")
        for i, one in enumerate(layers):
            if missing := [t for t in (one.keys, one.values) if t not in self.types]:
                raise InputError(f"cache {missing[0]}: {self.engine} has {', '.join(self.types)}")
            if not self._known(i, one, evict):
                raise InputError(f"cache {one}: the profile has no price of that; run assay profile --cache again")
        if self.server.alike != "none" and len({*layers}) > 1:
            raise InputError(f"{self.engine} has one cache type for all layers; give every layer the same")
        if self.server.alike == "all" and layers[0].keys != layers[0].values:
            raise InputError(f"{self.engine} has one cache type for keys and values; give both the same")
        used = evict if any(one.share < 1 for one in layers) else None
        nbytes = sum(self.nbytes(i, one, used) for i, one in enumerate(layers))
        if self.server.alike != "none":
            return CacheChoice(tuple(layers), None, nbytes, self._loss(None, layers[0], None))
        return CacheChoice(tuple(layers), used, nbytes, sum(self._loss(i, one, used) for i, one in enumerate(layers)))

    def nbytes(self, layer: int, one: Stored, evict: str | None) -> int:
        """Bytes of one layer of all sequences at their full length."""
        own, by = self.footprint.layers[layer], self.server
        tokens = min(self.load.context, own.window or self.load.context)
        if by.alike != "none":
            kept = by.page * math.ceil(tokens / by.page)
            keys, values = self.types[one.keys].bits, self.types[one.values].bits
            latent = self.footprint.latent if by.latent else None
            bits = latent * keys if latent else own.keys * keys + own.values * values
            return (math.ceil(kept * bits / 8) + own.state) * self.load.batch
        kept = math.ceil(one.share * tokens)
        room = max(ROOM, kept // SHARE)
        total = self._beside(layer, one, evict) * (kept + room)
        once = 0
        for side, name, elements in (("keys", one.keys, own.keys), ("values", one.values, own.values)):
            exact, level = HALF * elements, self.types[name].price
            if level == EXACT:
                total += exact * (kept + room)
                continue
            price = self.prices[layer, side, level]
            waiting = min(kept, price.waiting)
            total += price.bytes_per_token * (kept - waiting + room) + exact * (waiting + room) + price.fixed
            once += price.once
        return math.ceil(total + own.state) * self.load.batch + once

    def _beside(self, layer: int, one: Stored, evict: str | None) -> float:
        """Bytes of a kept token that are neither key nor value."""
        price = self.prices.get((layer, "tokens", _evicted(evict, one.share)))
        return price.bytes_per_token if price else self.prices[layer, "tokens", "1"].bytes_per_token

    def _options(self, layer: int, evict: str | None) -> list[tuple[int, float, Stored]]:
        found = []
        for keys, values, share in itertools.product(self.types, self.types, self.shares(evict)):
            one = Stored(keys, values, share)
            if self._known(layer, one, evict):
                found.append((self.nbytes(layer, one, evict), self._loss(layer, one, evict), one))
        return found

    def _known(self, layer: int, one: Stored, evict: str | None) -> bool:
        return math.isfinite(self._loss(layer if self.server.alike == "none" else None, one, evict))

    def _loss(self, layer: int | None, one: Stored, evict: str | None) -> float:
        """Nats of one layer, or of all where `layer` is None; infinite where that was not priced, or can't be stacked."""
        keys, values = self.types[one.keys].price, self.types[one.values].price
        if self.server.alike == "all":
            return 0.0 if keys == EXACT else self._price(layer, "both", keys)
        sides = [("keys", keys), ("values", values)]
        loss = sum(self._price(layer, side, level) for side, level in sides if level != EXACT)
        if one.share == 1:
            return loss
        apart = self.prices.get((layer, "tokens", _evicted(evict, one.share)))
        joint = any(self.prices[layer, side, level].once for side, level in sides if level != EXACT)
        if apart is None or (joint and evict not in SHARED):
            return math.inf
        return loss + apart.nats

    def _price(self, layer: int | None, side: str, level: str) -> float:
        found = self.prices.get((layer, side, level))
        return math.inf if found is None else found.nats


SHARED = ("streaming_llm",)
"""Policies that keep the same tokens in every head, as levels that store the heads together need."""


def _evicted(evict: str | None, share: float) -> str:
    return "1" if evict is None or share == 1 else f"{evict} {share:g}"


def _front(options: Iterable[Any], key: Any) -> list[Any]:
    """By rising bytes, each with less loss than every smaller one."""
    kept: list[Any] = []
    for option in sorted(options, key=key):
        if not kept or key(option)[1] < key(kept[-1])[1]:
            kept.append(option)
    return kept


def _thinned(front: list[Any]) -> list[Any]:
    """At most `MOST_POINTS` of them, the ends among them, at even steps of bytes."""
    if len(front) <= MOST_POINTS:
        return front
    low, high = front[0][0], front[-1][0]
    cells: dict[int, Any] = {}
    for option in front:
        cells[math.ceil((MOST_POINTS - 1) * (option[0] - low) / (high - low))] = option
    return sorted({id(o): o for o in (front[0], *cells.values())}.values(), key=lambda o: (o[0], o[1]))
