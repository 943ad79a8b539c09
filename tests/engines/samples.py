"""Packed weights of random codes, and a tiny checkpoint that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from tiny import save

from assay.engines.layout import LAYOUTS
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed, PackedInteger

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


def folder_of(folder: Path, layout: str, weights: dict[str, Packed], kept: list[str] | None = None) -> Checkpoint:
    """A checkpoint of these modules alone, in a layout."""
    levels = {f"{module}.weight": weight.level for module, weight in weights.items()}
    ordered = frozenset(f"{m}.weight" for m, w in weights.items() if isinstance(w, PackedOrdered))
    describe = LAYOUTS[layout].config
    assert describe is not None
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": describe(levels, kept or [], ordered)}
    (folder / "config.json").write_text(json.dumps(config))
    stored = {f"{m}.{suffix}": t for m, w in weights.items() for suffix, t in LAYOUTS[layout].tensors(w).items()}
    save_file(stored, folder / "model.safetensors")
    return Checkpoint.open(folder)


def shuffled(weight: PackedInteger, seed: int) -> Packed:
    """The same codes in groups of inputs that are not neighbours."""
    columns = weight.codes.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return PackedOrdered.of(weight, order // (columns // weight.scale.shape[1]))
