"""What the page asks for: budget, engine, method, pins and what is served, checked as it comes in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from assay.budget.serving import DEFAULT_CACHE, parse_tokens
from assay.model.errors import InputError

MOST_PINS = 2000
ANY = "*"
KEEP = "keep"


@dataclass(frozen=True)
class Pin:
    """Matrices whose level the user fixed. block, role: of a cell of the map, `ANY` for all; level: a name or `KEEP`."""

    block: str
    role: str
    level: str

    def matches(self, block: str, role: str) -> bool:
        """Whether it means the matrices of this cell."""
        return self.block in (ANY, block) and self.role in (ANY, role)


@dataclass(frozen=True)
class State:
    """What one window shows. bits: bound on the average in the blocks; context: tokens of a sequence, None: not served.

    Of pins that name the same matrices the last one counts.
    """

    bits: float
    engine: str
    method: str = "auto"
    context: int | None = None
    batch: int = 1
    cache: str = DEFAULT_CACHE
    pins: tuple[Pin, ...] = ()

    @classmethod
    def parse(cls, text: str) -> State:
        """From the page's JSON. Raises InputError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError("the state is not JSON; load the page again") from None
        if not isinstance(value, dict) or not {"bits", "engine"} <= set(value) <= {f.name for f in fields(cls)}:
            raise InputError("the state lacks a part or has one too many; load the page again")
        bits, context, batch = value["bits"], value.get("context"), value.get("batch", 1)
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf:
            raise InputError(f"bits must be a number above zero, not {bits!r}")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch must be a whole number above zero, not {batch!r}")
        words = {n: value.get(n, default) for n, default in (("engine", ""), ("method", "auto"), ("cache", DEFAULT_CACHE))}
        if odd := [n for n, word in words.items() if not isinstance(word, str)]:
            raise InputError(f"{odd[0]} must be a name")
        tokens = None if context is None or context == "" else parse_tokens(str(context))
        return cls(float(bits), context=tokens, batch=batch, pins=_pins(value.get("pins", [])), **words)

    def to_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        return asdict(self) | {"pins": [[p.block, p.role, p.level] for p in self.pins]}

    @property
    def budget(self) -> Mapping[str, Any]:
        """As `assay plan` takes it."""
        served = {} if self.context is None else {"context": str(self.context), "batch": self.batch, "cache": self.cache}
        return {"bits": self.bits} | served


def _pins(value: Any) -> tuple[Pin, ...]:
    if not isinstance(value, list) or len(value) > MOST_PINS:
        raise InputError(f"pins must be a list of at most {MOST_PINS}")
    if not all(isinstance(p, list) and len(p) == 3 and all(isinstance(word, str) for word in p) for p in value):
        raise InputError("a pin is a block, a role and a level")
    return tuple(Pin(*p) for p in value)
