"""What a method is: a frozen dataclass that implements one verb. The file's name is the method's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from assay import methods
from assay.methods.solve.basis import Waiting
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Statistics:
    """What was measured of a batch of equal-shaped matrices, float32; None for what was not measured or not asked for.

    h: [batch, in, in] second moment of the inputs; g: [batch, out, out] second moment of the output gradients;
    gradient: [batch, out, in] of the mean loss on the text; fisher: [batch, out, in] mean over tokens of its square,
    labels sampled from the model. bases: waits for what an `EarlyEncoder` has begun of these.
    """

    h: Tensor | None = None
    g: Tensor | None = None
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    bases: Waiting | None = None


@runtime_checkable
class Method(Protocol):
    """Facts that every method states about itself.

    verb: transform, score, encode, combine, attach or train; needs: statistics it reads ("H", "G", "gradient", "fisher"),
    and "model" where it looks at the model itself; paper: title and year of its source.
    """

    verb: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]


class Encoder(Method, Protocol):
    """A method that turns weights into their compressed form.

    prices: which price of the profile predicts it; formats: of the levels that it can be asked for; levels:
    those that it offers a plan, for rows of so many weights.
    """

    prices: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]

    def levels(self, columns: int) -> list[Level]:
        """See above; menus.py holds what most methods share."""
        ...

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """Compress a batch of equal-shaped matrices.

        weight: float32 [batch, out, in]; scale_dtype: of scales, tables, factors and exact weights; stats: those of
        `needs` that were measured.
        """
        ...


@runtime_checkable
class EarlyEncoder(Encoder, Protocol):
    """An encoder for which much has to be done on one thread first: it may begin while the matrices before are solved."""

    def begin(self, stats: Statistics) -> Statistics:
        """`stats` with what was begun; `encode` does the same for others, only later."""
        ...


def names(folder: str = "quantize") -> list[str]:
    """Every method of a folder, in alphabetical order."""
    return sorted(_files(folder))


def get(name: str) -> type[Encoder]:
    """The class of an encoder by its file name. Raises InputError naming the nearest."""
    found: type[Encoder] = load(name, "quantize")
    return found


def weightwise(*methods: str) -> list[str]:
    """Statistics with a number for every weight that these methods need."""
    return sorted({need for name in methods for need in get(name).needs} - {"H", "G"})


def load(name: str, folder: str) -> Any:
    """The class of a method of a folder by its file name. Raises InputError naming the nearest."""
    known = names(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"unknown method {name!r}; {hint}")
    return importlib.import_module(f"assay.methods.{folder}.{name}").METHOD


def _files(folder: str) -> Iterator[str]:
    for root in methods.__path__:
        found = pkgutil.iter_modules([f"{root}/{folder}"])
        yield from (m.name for m in found if not m.name.startswith("_"))
