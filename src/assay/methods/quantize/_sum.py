"""Codes with exact weights beside them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.terms import Exact, PackedSum


def with_exact(level: Level, codes: Iterable[Packed], weight: Tensor, mask: Tensor, dtype: torch.dtype) -> list[Packed]:
    """The codes of each matrix of a batch, with the masked weights [batch, out, in] kept exactly in `dtype`."""
    if level == level.base:
        return list(codes)
    return [PackedSum(level, c, None, Exact.of(w, m, dtype)) for c, w, m in zip(codes, weight, mask, strict=True)]


def with_factors(level: Level, codes: Iterable[Packed], factors: tuple[Tensor, Tensor]) -> list[Packed]:
    """The codes of each matrix of a batch, with a low-rank product [batch, out, rank] @ [batch, rank, in] added."""
    return [PackedSum(level, c, (a, b)) for c, a, b in zip(codes, *(f.contiguous() for f in factors), strict=True)]
