"""Budgets as people state them: file size, average bits, or a bound on the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from assay.budget.menu import Decision
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


def bits_to_bytes(bits: float, count: int) -> int:
    """Bytes of `count` weights at `bits` per weight as written in decimal, rounded down."""
    return int(Fraction(str(bits)) * count / 8)


@dataclass(frozen=True)
class Budget:
    """Exactly one of size (bytes of all weight files), bits (average inside the blocks), max_loss (KL, nats), level
    (one for everything inside the blocks, by its name).

    Raises InputError naming what contradicts.
    """

    size: str | int | None = None
    bits: float | None = None
    max_loss: float | None = None
    level: str | None = None

    def __post_init__(self) -> None:
        given = {"--" + k.replace("_", "-"): v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            names = " and ".join(given) if given else "none"
            raise InputError(f"give one budget: --size, --bits, --max-loss or --level (got {names})")
        if self.level is not None:
            Level.parse(self.level)
        if self.size is not None:
            parse_size(self.size)
        for name, value in (("--bits", self.bits), ("--max-loss", self.max_loss)):
            if value is not None and not _positive(value):
                raise InputError(f"{name} {value} must be a number above zero")

    def limit_for(self, decisions: Sequence[Decision], fixed_bytes: int) -> int:
        """Bytes that all decisions together may take. fixed_bytes: the rest of the weight files.

        For bits: what lies outside the blocks counts as stored. Raises InputError with the achievable range.
        """
        if self.size is not None:
            limit = parse_size(self.size) - fixed_bytes
            self._check(limit, decisions, fixed_bytes)
            return limit
        assert self.bits is not None, "neither a loss bound nor a level has a byte limit"
        count = sum(d.count for d in decisions if d.inside)
        limit = bits_to_bytes(self.bits, count)
        inside = [d for d in decisions if d.inside]
        low, high = (8 * sum(d.options[i].nbytes for d in inside) / max(count, 1) for i in (0, -1))
        if self.bits < low:
            allowed = f"{low:.3f} to {high:.3f}"
            raise InputError(f"--bits {self.bits} is out of reach; this model and engine allow {allowed}")
        return min(limit, sum(d.options[-1].nbytes for d in inside)) + sum(
            d.options[-1].nbytes for d in decisions if not d.inside
        )

    def _check(self, limit: int, decisions: Sequence[Decision], fixed_bytes: int) -> None:
        low, high = (fixed_bytes + sum(d.options[i].nbytes for d in decisions) for i in (0, -1))
        if limit + fixed_bytes < low:
            allowed = f"{low / 1e6:,.2f} to {high / 1e6:,.2f} MB"
            raise InputError(f"--size {self.size} is out of reach; this model and engine allow {allowed}")


def _positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < math.inf
