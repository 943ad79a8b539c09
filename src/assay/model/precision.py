"""Products with factors rounded to bf16, where the processor has units for them, or never so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


def bf16_products(wanted: bool = True) -> AbstractContextManager[None]:
    """Lets a CPU with bf16 units round the factors of float32 products to bf16, with sums still in float32."""
    return _products("bf16") if wanted else nullcontext()


def float32_products() -> AbstractContextManager[None]:
    """Keeps float32 products in float32, whatever `torch.set_float32_matmul_precision` allows outside."""
    return _products("ieee")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def rounded_maps() -> AbstractContextManager[Any]:
    """Attention in bf16 while products are rounded, and linear maps where the processor has no unit that rounds factors itself:
    torch makes their products fast in no other way."""
    rounded = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return _RoundedMaps() if rounded and has_bf16("cpu") else nullcontext()


class _RoundedMaps(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in _maps():
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_rounded, (args, kwargs or {}))
        return func(*args, **kwargs).float()


@cache
def _maps() -> tuple[Any, ...]:
    """What is called with bf16; AMX rounds the factors of float32 products, and keeps their sums."""
    attention = functional.scaled_dot_product_attention
    return (attention,) if torch.cpu._is_amx_tile_supported() else (attention, functional.linear)


def _rounded(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@cache
def has_bf16(device: str) -> bool:
    """Whether products of bf16 are what the processor is fastest at."""
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()
