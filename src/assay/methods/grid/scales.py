"""How the scales of a table are stored: a float dtype, powers of two (MX), or two levels (NVFP4).

All functions take and return scales in real units, so a solver need not know the format:
what is stored instead is split off at the end, exactly.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

ScaleFormat = Literal["dtype", "e8m0", "nvfp4"]
"""A float each · a power of two each, 8 bits · FP8 E4M3 each and one power of two for the whole matrix."""

SCALE_BITS = 8
E4M3_MAX = 448.0
E8M0_BIAS = 127


def smallest(dtype: torch.dtype) -> float:
    """The least scale: normal, but in fp16, whose normal numbers end within the scales of quiet weights, subnormal."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype is torch.float16 else info.tiny


def round_float(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as `dtype` holds it, its sign kept, its magnitude finite and not below `smallest`."""
    return scale.abs().clamp(smallest(dtype), torch.finfo(dtype).max).copysign(scale).to(dtype)


def round_e8m0(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two nearest to each positive `scale` in log2, in `dtype`."""
    return power_of_two(scale.log2().round(), dtype)


def floor_e8m0(largest: Tensor, top: float, dtype: torch.dtype) -> Tensor:
    """The rule of the Microscaling formats (OCP, 2023): 2^(floor(log2 largest) - floor(log2 top)).

    largest: the largest magnitude of each group, positive; top: the largest value of the element format.
    Weights above top times that are clipped.
    """
    return power_of_two(_floor_log2(largest) - _floor_log2(torch.tensor(top)), dtype)


def ceil_e8m0(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two that is not below each positive `scale`, in `dtype`."""
    mantissa, exponent = torch.frexp(scale.float())
    return power_of_two(torch.where(mantissa == 0.5, exponent - 1, exponent), dtype)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent in `dtype`, the exponent clamped to that of its normal numbers: so products with FP8 numbers are exact."""
    info = torch.finfo(dtype)
    low, high = (int(_floor_log2(torch.tensor(x))) for x in (info.tiny, info.max))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(low, high).int()).to(dtype)


def _floor_log2(x: Tensor) -> Tensor:
    return torch.frexp(x.float()).exponent - 1


# ---- NVFP4 ---------------------------------------------------------------------------------


def tensor_scale(scale: Tensor) -> Tensor:
    """The smallest power of two that brings the positive scales [..., out, groups] within E4M3, [..., 1, 1], float32.

    NVFP4 stores any float32 there. A power of two makes the product with an E4M3 scale exact in every
    dtype, so that all readers decode the same weights and the two parts can be told from their product.
    """
    return ceil_e8m0(scale.float().amax((-2, -1), keepdim=True) / E4M3_MAX, torch.float32)


def round_nvfp4(scale: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive scales as E4M3 times `whole` (see `tensor_scale`), in `dtype`, which holds the product exactly."""
    parts = (scale / whole).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)
    return (parts.float() * whole).clamp(min=torch.finfo(dtype).tiny).to(dtype)


class TwoLevel(NamedTuple):
    """Scales as NVFP4 stores them."""

    parts: Tensor
    """[..., out, groups], float8_e4m3fn"""
    whole: Tensor
    """[...], float32, one number per matrix"""


def split_nvfp4(scale: Tensor) -> TwoLevel:
    """What `round_nvfp4` multiplied, from its product [..., out, groups]; ValueError if it was not such a product."""
    whole = tensor_scale(scale)
    parts = (scale.float() / whole).to(torch.float8_e4m3fn)
    if not torch.equal(parts.float() * whole, scale.float()):
        raise ValueError("these scales are no products of E4M3 numbers and one power of two")
    return TwoLevel(parts, whole[..., 0, 0])


# ---- MX ------------------------------------------------------------------------------------


def split_e8m0(scale: Tensor) -> Tensor:
    """Powers of two as E8M0 bytes (exponent + 127), uint8; ValueError for anything else."""
    mantissa, exponent = torch.frexp(scale.float())
    if bool((mantissa != 0.5).any()):
        raise ValueError("these scales are no powers of two")
    return (exponent - 1 + E8M0_BIAS).to(torch.uint8)
