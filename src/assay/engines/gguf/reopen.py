"""Opens a GGUF file with the gguf package and compares it with what was meant, bytes and values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, quants

from assay.engines.contract import Contract
from assay.engines.gguf.metadata import rope_tensors
from assay.engines.gguf.write import FILE, layout, tensor_bytes
from assay.engines.write import Loaders
from assay.model.checkpoint import Checkpoint
from assay.model.errors import ShortfallError
from assay.model.sites import load_config


def compare(
    destination: Path, source: Checkpoint, packed: Loaders, contract: Contract, transposed: frozenset[str] = frozenset()
) -> dict[str, int]:
    """Number of tensors found equal, by kind. Raises ShortfallError naming the first that differs.

    Bytes must be those that were meant, and weights must decode by the gguf package to what they decode to here.
    """
    found = {t.name: t for t in GGUFReader(destination / FILE).tensors}
    levels = {name: load().level for name, load in packed.items()}
    entries = layout(source, levels)
    extra = rope_tensors(load_config(source).to_dict())
    if odd := sorted(set(found) ^ {e.target.name for e in entries} ^ set(extra)):
        raise ShortfallError(f"{destination}: {odd[0]} is in the file or in the source, but not in both")
    counts = {"packed": 0, "copied": 0}
    for entry in entries:
        tensor = found[entry.target.name]
        same = tensor.tensor_type == entry.kind and tuple(int(n) for n in tensor.shape[::-1]) == entry.shape
        data = np.asarray(tensor.data).view(np.uint8)
        for i, name in enumerate(entry.target.sources):
            mine = tensor_bytes(source, packed, entry, name).numpy()
            stored = data[i] if entry.target.stacked else data
            same = same and np.array_equal(stored.reshape(mine.shape), mine)
            if same and name in packed:
                order = entry.target.order(entry.shape[-2])
                meant = packed[name]().decode()
                decoded = torch.from_numpy(np.array(quants.dequantize(stored, tensor.tensor_type)))
                same = torch.equal(decoded, meant.float() if order is None else meant.float()[order])
            if not same:
                raise ShortfallError(f"{destination}: {name} does not read back as it was meant")
            counts["packed" if name in packed else "copied"] += 1
    return counts
