"""Products with factors rounded to bf16, where the processor has units for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products(wanted: bool = True) -> Iterator[None]:
    """Lets a CPU with bf16 units round the factors of float32 products to bf16, with sums still in float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
