"""Packed weights of random codes, and a tiny checkpoint that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny import save

from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.model.packed import PackedInteger

CYCLE = (Level(4, 32), Level(8, None, True), Level(3, 32), Level(5, None), Level(2, 32, True), Level(4, None))


def random_packed(level: Level, rows: int, columns: int, dtype: torch.dtype, seed: int) -> PackedInteger:
    """Codes, scales and zero points that use their whole range."""
    generator = torch.Generator().manual_seed(seed)
    groups, top = level.groups(columns), 1 << int(level.bits)
    codes = torch.randint(0, top, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.exp(4 * torch.randn(rows, groups, generator=generator)).clamp(1e-4, 1e3).to(dtype)
    zero = torch.randint(0, top, (rows, groups), generator=generator, dtype=torch.uint8)
    return PackedInteger(level, codes, scale, torch.full_like(zero, top // 2) if level.symmetric else zero)


def scheme(level: Level) -> QuantizationScheme:
    """The same level in the words of the compressed-tensors library."""
    arguments = QuantizationArgs(
        num_bits=int(level.bits), type="int", symmetric=level.symmetric, group_size=level.group_size,
        strategy="channel" if level.group_size is None else "group",
    )  # fmt: skip
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def sample(folder: Path) -> tuple[Checkpoint, Mapping[str, Callable[[], PackedInteger]], dict[str, Level]]:
    """A tiny llama, loaders of random codes for its matrices at six levels in turn, and these levels."""
    source = Checkpoint.open(save("llama", folder))
    names = [n for n in source.names if "proj" in n]
    levels = {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}
    loaders = {
        name: partial(random_packed, level, *source.shape(name), source.dtype(name), i)
        for i, (name, level) in enumerate(levels.items())
    }
    return source, loaders, levels
