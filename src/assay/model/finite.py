"""Whether tensors hold numbers only."""

from __future__ import annotations

from torch import Tensor


def finite(x: Tensor) -> bool:
    """Whether no element of a tensor is infinite or NaN.

    One sum tells, many times faster than a look at every element: none of them leaves it finite. Where it overflows by itself,
    each element is looked at.
    """
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
