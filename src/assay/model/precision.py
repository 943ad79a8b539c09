"""Products with factors rounded to bf16, where the processor has units for them, or never so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


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
