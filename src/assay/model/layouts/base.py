"""What the readers of compressed layouts give: for each logical tensor its stored parts and how they decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.stored import TensorInfo

Parts = Mapping[str, Tensor]
"""Stored tensors of one logical tensor, by the suffix that follows its module's name."""
Headers = Mapping[str, TensorInfo]
SECONDS = 1.0
"""For one pattern of a config."""


@dataclass(frozen=True)
class Stored:
    """One logical tensor of which the files hold several parts.

    parts: names in the files by suffix; shape: of the model's tensor, None: as its part `weight_shape` says; dtype: of
    decoded values; decode: the model's tensor from the parts; level and restore: where the codes are one of our
    formats; turned: whether the weight [out, in] is a tensor [in, out] of the model; kept: the narrowest dtype that
    holds the decoded values, from the parts, where that is not `dtype`.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    decode: Callable[[Parts], Tensor]
    level: Level | None = None
    restore: Callable[[Parts], Packed] | None = None
    turned: bool = False
    kept: Callable[[Parts], torch.dtype] | None = None


def packed(
    parts: Mapping[str, str], shape: tuple[int, ...] | None, dtype: torch.dtype, level: Level,
    restore: Callable[[Parts], Packed], turned: bool = False,
) -> Stored:  # fmt: skip
    """A weight whose codes are one of our formats."""

    def decode(stored: Parts) -> Tensor:
        weight = restore(stored).decode()
        return weight.T.contiguous() if turned else weight

    return Stored(parts, shape, dtype, decode, level, restore, turned)


def modules(stored: Headers, suffix: str) -> Iterator[str]:
    """Names of modules that have a part of this name, their dot included."""
    return (name.removesuffix(suffix) for name in stored if name.endswith(f".{suffix}"))


def parts_of(stored: Headers, module: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Those of the parts that a module has."""
    return {suffix: module + suffix for suffix in suffixes if module + suffix in stored}


def need(stored: Headers, module: str, suffixes: tuple[str, ...]) -> None:
    """Raises InputError for a module that lacks one of its parts."""
    for suffix in suffixes:
        if module + suffix not in stored:
            raise InputError(f"tensor {module}{suffix} is missing from the weight files; download the model again")


def check_shapes(module: str, stored: Headers, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError for a part that has another shape than the rest of its module needs."""
    for suffix, shape in wanted.items():
        have = stored[module + suffix].shape
        if have != shape:
            raise InputError(f"{module}{suffix} is {list(have)}, the rest of it needs {list(shape)}; download the model again")


def matches(pattern: str, module: str) -> bool:
    """Whether a config's regular expression matches the start of a module's name. Raises InputError for one that takes long."""
    try:
        return regex.match(pattern, module, timeout=SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        raise InputError(f"config.json: the pattern {pattern[:80]!r} can't be matched ({error}); download it again") from None


def setting(config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """A value of a quantization_config. Raises InputError for one of another type."""
    value = config.get(key, default)
    if value is not None and not isinstance(value, kind):
        raise InputError(f"config.json: quantization_config.{key} must be {kind.__name__}, not {value!r}")
    return value
