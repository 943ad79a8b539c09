"""What a method is: a frozen dataclass that implements one verb. The file's name is the method's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from assay import methods
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import Packed


@dataclass(frozen=True)
class Statistics:
    """What was measured of a batch of equal-shaped matrices, float32; None for what was not measured or not asked for.

    h: [batch, in, in] second moment of the inputs; g: [batch, out, out] second moment of the output gradients;
    gradient: [batch, out, in] of the mean loss on the text; fisher: [batch, out, in] mean over tokens of its square,
    labels sampled from the model.
    """

    h: Tensor | None = None
    g: Tensor | None = None
    gradient: Tensor | None = None
    fisher: Tensor | None = None


@runtime_checkable
class Method(Protocol):
    """Facts that every method states about itself.

    verb: score, encode, combine, attach or train; needs: statistics it reads ("H", "G", "gradient", "fisher");
    prices: which price of the profile predicts it; paper: title and year of its source; formats: of the levels
    that it can be asked for; levels: those that it offers a plan, for rows of so many weights.
    """

    verb: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    prices: ClassVar[str]
    paper: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]

    def levels(self, columns: int) -> list[Level]:
        """See above; menus.py holds what most methods share."""
        ...


class Encoder(Method, Protocol):
    """A method that turns weights into their compressed form."""

    def encode(self, weight: Tensor, level: Level, scale_dtype: torch.dtype, stats: Statistics) -> list[Packed]:
        """Compress a batch of equal-shaped matrices.

        weight: float32 [batch, out, in]; scale_dtype: of scales, tables, factors and exact weights; stats: those of
        `needs` that were measured.
        """
        ...


_FOLDERS = ("quantize",)


def names() -> list[str]:
    """Every method, in alphabetical order."""
    return sorted(_homes())


def get(name: str) -> type[Encoder]:
    """The class of a method by its file name. Raises InputError naming the nearest."""
    homes = _homes()
    if name not in homes:
        near = difflib.get_close_matches(name, homes, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(homes))}"
        raise InputError(f"unknown method {name!r}; {hint}")
    found: type[Encoder] = importlib.import_module(f"assay.methods.{homes[name]}.{name}").METHOD
    return found


def weightwise(*methods: str) -> list[str]:
    """Statistics with a number for every weight that these methods need."""
    return sorted({need for name in methods for need in get(name).needs} - {"H", "G"})


def _homes() -> dict[str, str]:
    return {file: folder for folder in _FOLDERS for file in _files(folder)}


def _files(folder: str) -> Iterator[str]:
    for root in methods.__path__:
        found = pkgutil.iter_modules([f"{root}/{folder}"])
        yield from (m.name for m in found if not m.name.startswith("_"))
