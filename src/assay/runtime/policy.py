"""What a policy is: it drops tokens, changes how keys and values are stored, or picks what a query reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.codecs import Side

Statistics = tuple[Tensor, ...]
"""Running numbers of each slot, float32 [B, H, S] each."""
Shape = str | tuple[float, ...] | tuple[tuple[float, ...], ...]


@runtime_checkable
class Evictor(Protocol):
    """Drops tokens after a layer attended to new ones.

    budget: tokens kept, as a share of the prompt; tokens: the same as a number; sinks: first tokens that always stay;
    shape: how layers and heads share the budget, "uniform", "pyramid", "prefix", or a weight for each layer or for each
    layer's heads; statistics: how many running numbers a slot has; shared: all heads keep the same tokens; grows: what is
    generated stays beyond the budget.
    """

    statistics: ClassVar[int]
    shared: ClassVar[bool]

    @property
    def budget(self) -> float: ...

    @property
    def tokens(self) -> int | None: ...

    @property
    def sinks(self) -> int: ...

    @property
    def grows(self) -> bool: ...

    @property
    def shape(self) -> Shape: ...

    def observe(self, step: Step, past: Statistics) -> Statistics:
        """The running numbers after this step, `past` itself where it was changed in place; new slots come with zeros."""
        ...

    def score(self, step: Step, past: Statistics) -> Tensor:
        """Worth of each slot, float32 [B, H, S], or [B, 1, S] where all heads share; the lowest go."""
        ...

    def recent(self, capacity: int) -> int:
        """Latest tokens that always stay, of so many kept."""
        ...

    def target(self, capacity: int, prefill: bool) -> int:
        """How many stay when more than `capacity` are there: fewer where dropping is rare and in bulk."""
        ...


@runtime_checkable
class Packer(Protocol):
    """Changes how older keys and values are stored. stage: 1 maps channels, 2 writes codes; maps come first."""

    stage: ClassVar[int]

    def sides(self, layer: int) -> tuple[Side | None, Side | None]:
        """How a layer stores its keys and its values; None as they are."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Picks, for a single query, the slots that are read; nothing is dropped."""

    def away(self, layer: int) -> bool:
        """Whether a layer's keys and values are kept in host memory and only what is read is fetched."""
        ...

    def labels(self, keys: Tensor, layer: int, head: int) -> Tensor:
        """What finds tokens later: keys [B, H, n, D] of the heads from `head` on -> [B, H, n, r]."""
        ...

    def pick(self, query: Tensor, labels: Tensor, positions: Tensor, layer: int, head: int) -> Tensor | None:
        """Slots int [B, H, k] that a query [B, Hq, 1, D] reads; None for all."""
        ...


@dataclass(frozen=True)
class Stack:
    """Policies in the order in which they act: evict, then map channels, then quantize, then read."""

    evictor: Evictor | None = None
    packers: tuple[Packer, ...] = ()
    reader: Reader | None = None

    @classmethod
    def of(cls, policies: Sequence[Any]) -> Stack:
        """Raises InputError for two policies that do the same, and for two that can't be stacked."""
        evictors = [p for p in policies if isinstance(p, Evictor)]
        packers = sorted((p for p in policies if isinstance(p, Packer)), key=lambda p: p.stage)
        readers = [p for p in policies if isinstance(p, Reader)]
        for what, found in (("drop tokens", evictors), ("pick what is read", readers)):
            if len(found) > 1:
                raise InputError(f"{_name(found[0])} and {_name(found[1])} both {what}; attach one of them")
        stack = cls(evictors[0] if evictors else None, tuple(packers), readers[0] if readers else None)
        if stack.reader and stack.reader.away(1 << 30) and (stack.evictor or stack.packers):
            raise InputError(f"{_name(stack.reader)} with offload=True keeps everything as it is; use it alone")
        joint = [m for side in stack.sides(0) if side for m in side.maps if m.joint]
        if stack.evictor and not stack.evictor.shared and joint:
            raise InputError(
                f"{_name(stack.evictor)} keeps other tokens in each head, but cskv stores heads together; use it alone"
            )
        return stack

    def sides(self, layer: int) -> tuple[Side | None, Side | None]:
        """How a layer stores keys and values when all packers have acted."""
        pairs = [p.sides(layer) for p in self.packers]
        return _merged([k for k, _ in pairs if k], "keys"), _merged([v for _, v in pairs if v], "values")


def _merged(sides: Sequence[Side], what: str) -> Side | None:
    if not sides:
        return None
    coded = [s for s in sides if s.codec is not None]
    if len(coded) > 1:
        raise InputError(f"two policies quantize the {what}; attach one of them")
    last = (coded or list(sides))[-1]
    maps = tuple(m for s in sides for m in s.maps)
    return Side(maps, last.codec, max(s.residual for s in sides), max(s.block for s in sides), last.running, last.every)


def _name(policy: Any) -> str:
    return type(policy).__module__.rpartition(".")[2]
