"""What compressed weights and a model's config become in the layout of an engine: a table of writers, one entry a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from assay.model.errors import InputError
from assay.model.layouts import awq, compressed_tensors, gptq
from assay.model.level import Level
from assay.model.packed import Packed

Config = Callable[[Mapping[str, Level], list[str], frozenset[str]], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """How compressed weights lie in the files.

    tensors: stored parts by the suffix that follows a module's name; nbytes: of a weight at a level with so many rows,
    columns and bytes a scale; config: quantization_config from the levels by tensor, the linear modules that stay and
    the weights whose groups are not neighbours (None: the layout's own); reader: the library that proves it, "" for our
    own decoder; ordered: whether groups need not be neighbours.
    """

    tensors: Callable[[Packed], dict[str, Tensor]]
    nbytes: Callable[[Level, int, int, int], int]
    config: Config | None = None
    reader: str = ""
    ordered: bool = False


def _own_nbytes(level: Level, rows: int, columns: int, itemsize: int) -> int:
    return level.nbytes(rows, columns, itemsize)


def _compressed_tensors(inputs: compressed_tensors.Inputs) -> Layout:
    rounded_inputs = inputs != "exact"
    return Layout(
        partial(compressed_tensors.tensors, rounded_inputs=rounded_inputs),
        partial(compressed_tensors.nbytes, rounded_inputs=rounded_inputs),
        lambda levels, kept, ordered: compressed_tensors.config(levels, kept, inputs),
        "compressed-tensors",
    )


def _gptq(later: bool) -> Layout:
    return Layout(
        partial(gptq.tensors, later=later), gptq.nbytes,
        lambda levels, kept, ordered: gptq.config(levels, kept, later, bool(ordered)), ordered=True,
    )  # fmt: skip


LAYOUTS: Mapping[str, Layout] = {
    "assay": Layout(lambda weight: weight.tensors(), _own_nbytes, ordered=True),
    "compressed-tensors": _compressed_tensors("exact"),
    "compressed-tensors-w8a8": _compressed_tensors("dynamic"),
    "compressed-tensors-w8a8-static": _compressed_tensors("static"),
    "gptq": _gptq(False),
    "gptq-v2": _gptq(True),
    "awq": Layout(awq.tensors, awq.nbytes, lambda levels, kept, ordered: awq.config(levels, kept)),
    "gguf": Layout(lambda weight: weight.tensors(), _own_nbytes),
    "plain": Layout(lambda weight: {"weight": weight.decode()}, _own_nbytes, ordered=True),
}


def nbytes(layout: str, weight: Packed) -> int:
    """Exact bytes of a weight in a layout."""
    if layout == "assay":
        return weight.nbytes
    return sum(t.nbytes for t in LAYOUTS[layout].tensors(weight).values())


def check_alike(levels: Mapping[str, Level], engine: str) -> None:
    """Raises InputError naming two weights of different levels, for engines that hold one level."""
    first = next(iter(levels), None)
    for name, level in levels.items():
        if first is not None and level != levels[first]:
            raise InputError(
                f"{engine} holds one level for the whole model: {first} is {levels[first].name}, {name} is {level.name}; "
                "use --level or a plan of one level, or another engine"
            )
