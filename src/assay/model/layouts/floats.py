"""Small floats as bit patterns, and as places in the sorted tables of our formats."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""Value of each 4-bit pattern (OCP Microscaling Formats, 2023)."""
E4M3 = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
"""Value of each 8-bit pattern ("FP8 formats for deep learning", 2022); NaN at 0x7F and 0xFF."""


def table_of(patterns: Tensor) -> Tensor:
    """The finite values in rising order, the last repeated up to the number of patterns."""
    values = patterns[patterns.isfinite()].unique()
    return torch.cat([values, values[-1:].expand(len(patterns) - len(values))])


def to_places(codes: Tensor, patterns: Tensor) -> Tensor:
    """Bit patterns (uint8) as indices into `table_of`; both zeros are one. Raises ValueError for a NaN."""
    values = patterns[codes.int()]
    if not bool(values.isfinite().all()):
        raise ValueError("a weight is NaN")
    finite = patterns[patterns.isfinite()].unique()
    return torch.searchsorted(finite, values).to(torch.uint8)


def to_patterns(places: Tensor, patterns: Tensor) -> Tensor:
    """Inverse of `to_places`; zero is the positive one."""
    table = table_of(patterns)
    first = torch.stack([(patterns == v).nonzero()[0, 0] for v in table]).to(torch.uint8)
    return first[places.int()]
