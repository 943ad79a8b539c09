"""Budgets as people state them: file size, memory while serving, average bits, speed, or a bound on the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from assay.budget.menu import Decision
from assay.budget.serving import DEFAULT_CACHE, Load, parse_tokens
from assay.model.errors import InputError
from assay.model.level import Level

UNITS = {
    "": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
    "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of "3.5GB", "22GiB", "900MB" or a number of bytes, rounded down. Raises InputError."""
    match = re.fullmatch(r"\s*(-?)([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[3].lower() not in UNITS:
        raise InputError(
            f"size {text!r} not understood; write it like 3.5GB or 22GiB "
            "(units: GB or G is 10^9 bytes, GiB is 2^30, likewise K, M and T; no unit: bytes)"
        )
    value = int(Fraction(match[2]) * UNITS[match[3].lower()])
    if match[1] or value < 1:
        raise InputError(f"size {text!r} must be one byte or more; write it like 3.5GB or 22GiB")
    return value


def bits_allowed(low: float, high: float) -> str:
    """A range of average bits in words, its lower end one that is allowed."""
    return f"{math.ceil(1000 * low) / 1000:.3f} to {high:.3f}"


def bits_to_bytes(bits: float, count: int) -> int:
    """Bytes of `count` weights at `bits` per weight as written in decimal, rounded down.

    Up where only the last digit of what a plan says its bits are is lacking, so that its bits are a budget that holds it.
    """
    return int(Fraction(str(bits)) * count / 8 * (1 + Fraction(1, 10**15)))


AUTO = "auto"
LIMITS = ("size", "bits", "memory", "max_loss", "level", "latency", "tokens_per_second")


@dataclass(frozen=True)
class Budget:
    """Exactly one limit: size (bytes of all weight files), bits (average inside the blocks), memory (bytes while it is
    served), max_loss (KL, nats), level (one for everything inside the blocks, by its name), latency (milliseconds a
    token) or tokens_per_second. And for how much: context (tokens of a sequence), batch (sequences) and cache (how keys
    and values are stored), which memory needs and which the others report on. cache "auto" shares the memory between weights
    and cache; evict: a policy by which it may drop tokens.

    Raises InputError naming what contradicts.
    """

    size: str | int | None = None
    bits: float | None = None
    max_loss: float | None = None
    level: str | None = None
    memory: str | int | None = None
    latency: float | None = None
    tokens_per_second: float | None = None
    context: str | int | None = None
    batch: int | None = None
    cache: str | None = None
    evict: str | None = None

    def __post_init__(self) -> None:
        check_limits({name: getattr(self, name) for name in LIMITS})
        if self.level is not None:
            Level.parse(self.level)
        for name in ("size", "memory"):
            if getattr(self, name) is not None:
                parse_size(getattr(self, name))
        for name in ("bits", "max_loss", "latency", "tokens_per_second"):
            if getattr(self, name) is not None and not _positive(getattr(self, name)):
                raise InputError(f"{_flag(name)} {getattr(self, name)} must be a number above zero")
        if self.context is not None:
            parse_tokens(self.context)
        elif needing := [name for name in ("memory", "batch", "cache", "evict") if getattr(self, name) is not None]:
            raise InputError(f"{_flag(needing[0])} needs --context: how many tokens a sequence may have, like 32k")
        if self.cache == AUTO and self.memory is None:
            raise InputError("--cache auto needs --memory: only there do weights and cache share a budget; or name a cache type")
        if self.evict is not None and (self.memory is None or self.cache not in (None, AUTO)):
            raise InputError("--evict needs --memory and --cache auto: it lets the plan drop tokens for bytes")
        if self.batch is not None and (isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1):
            raise InputError(f"--batch {self.batch}: give a whole number of sequences above zero")

    @property
    def load(self) -> Load | None:
        """What is served, where that was said."""
        if self.context is None:
            return None
        return Load(parse_tokens(self.context), self.batch or 1, DEFAULT_CACHE if self.cache in (None, AUTO) else str(self.cache))

    @property
    def bounds_bytes(self) -> bool:
        """Whether it says how many bytes the weights may take."""
        return self.size is not None or self.bits is not None or self.memory is not None

    @property
    def whole(self) -> bool:
        """Whether it counts what lies outside the blocks."""
        return self.size is not None or self.memory is not None

    @property
    def milliseconds(self) -> float | None:
        """Bound on the time of a token, where there is one."""
        return 1000 / self.tokens_per_second if self.tokens_per_second else self.latency

    def limit_for(self, decisions: Sequence[Decision], fixed_bytes: int, beside: int = 0) -> int:
        """Bytes that all decisions together may take. fixed_bytes: the rest of the weight files, or of the weights in memory.

        beside: memory that is no weights; for bits: what lies outside the blocks counts as stored. Raises InputError
        with the achievable range.
        """
        given = self.size if self.size is not None else self.memory
        if given is not None:
            limit = parse_size(given) - fixed_bytes - beside
            self._check(limit, decisions, fixed_bytes, beside)
            return limit
        assert self.bits is not None, "neither a loss bound nor a level has a byte limit"
        count = sum(d.count for d in decisions if d.inside)
        limit = bits_to_bytes(self.bits, count)
        inside = [d for d in decisions if d.inside]
        low, high = (8 * sum(d.options[i].nbytes for d in inside) / max(count, 1) for i in (0, -1))
        if self.bits < low:
            raise InputError(f"--bits {self.bits} is out of reach; this model and engine allow {bits_allowed(low, high)}")
        return min(limit, sum(d.options[-1].nbytes for d in inside)) + sum(
            d.options[-1].nbytes for d in decisions if not d.inside
        )

    def _check(self, limit: int, decisions: Sequence[Decision], fixed_bytes: int, beside: int) -> None:
        low, high = (fixed_bytes + beside + sum(d.options[i].nbytes for d in decisions) for i in (0, -1))
        if limit + fixed_bytes + beside >= low:
            return
        allowed = f"{math.ceil(low / 1e4) / 100:,.2f} to {high / 1e6:,.2f} MB"
        if self.size is not None:
            raise InputError(f"--size {self.size} is out of reach; this model and engine allow {allowed}")
        why = f"{beside / 1e6:,.2f} MB of that are cache, activations and engine; a shorter --context, smaller --batch or --cache"
        raise InputError(
            f"--memory {self.memory} is out of reach; this model, engine and context allow {allowed} ({why} need less)"
        )


def check_limits(given: Mapping[str, object]) -> None:
    """Raises InputError unless exactly one limit is given, naming those that exclude each other."""
    flags = [_flag(name) for name, value in given.items() if value is not None]
    if len(flags) != 1:
        every = ", ".join(_flag(name) for name in LIMITS[:-1]) + f" or {_flag(LIMITS[-1])}"
        raise InputError(f"give one budget: {every} (got {' and '.join(flags) or 'none'})")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf
