"""The first blocks of the built-in model, for tests that run it often."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import assay


def save(folder: Path, blocks: int = 3, zero: Callable[[str], bool] = lambda name: False) -> Path:
    """The built-in model with its first `blocks` blocks in a new folder, tensors whose name `zero` takes all zeros."""
    source = assay.builtin_model()
    shutil.copytree(source, folder)
    stored = load_file(source / "model.safetensors")
    dropped = tuple(f"model.layers.{i}." for i in range(blocks, 6))
    kept = {n: torch.zeros_like(t) if zero(n) else t for n, t in stored.items() if not n.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
