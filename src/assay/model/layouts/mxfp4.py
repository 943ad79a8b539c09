"""Microscaling FP4 as gpt-oss stores its experts: `X_blocks` and `X_scales` of a 3-D parameter X [experts, in, out].

blocks: uint8 [experts, out, in / 32, 16], two E2M1 codes a byte, the lower nibble first; scales: uint8 exponents plus 127
[experts, out, in / 32]. Source: OCP Microscaling Formats (MX) Specification (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.model.layouts.base import Headers, Parts, Stored, check_shapes
from assay.model.layouts.floats import E2M1


def find(config: Mapping[str, Any], stored: Headers) -> dict[str, Stored]:
    """Every parameter in this layout. Raises InputError for shapes that contradict each other."""
    found = {}
    for name, info in stored.items():
        whole = name.removesuffix("_blocks")
        if whole == name or f"{whole}_scales" not in stored or len(info.shape) < 3:
            continue
        *lead, rows, groups, half = info.shape
        check_shapes(whole, stored, {"_scales": (*lead, rows, groups)})
        parts = {"blocks": name, "scales": f"{whole}_scales"}
        found[whole] = Stored(parts, (*lead, 2 * groups * half, rows), torch.bfloat16, decode)
    return found


def decode(parts: Parts) -> Tensor:
    """bf16 [..., in, out]; every product is exact."""
    blocks = parts["blocks"]
    codes = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2)
    values = torch.ldexp(E2M1[codes.int()], parts["scales"].int()[..., None] - 127)
    return values.flatten(-2).mT.to(torch.bfloat16).contiguous()
