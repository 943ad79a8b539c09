"""Results and profiles in the layouts of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from assay.budget.offers import rows_of
from assay.engines.convert import convert
from assay.engines.gguf import imatrix
from assay.measure.profile import Profile
from assay.model.checkpoint import Checkpoint
from assay.model.gguf_layout import targets


def export(source: Path, to: str, destination: Path) -> dict[str, Any]:
    """Write a compressed checkpoint in another layout, see `TARGETS`, or a profile as an importance matrix of llama.cpp.

    Raises InputError.
    """
    if to == "imatrix":
        matrix = importance(Profile.open(source))
        imatrix.write(destination, matrix)
        return {"out": str(destination), "to": to, "bytes": destination.stat().st_size, "weights": len(matrix.entries)}
    contract = convert(source, to, destination)
    return {"out": str(destination), "to": to, "engine": contract.name, "bytes": Checkpoint.open(destination).weight_bytes}


def importance(profile: Profile) -> imatrix.Imatrix:
    """The diagonals of H by the names of the GGUF tensors. Raises InputError for a family without a GGUF layout."""
    rows = rows_of(profile)
    depth = 1 + max((r.block for r in rows if r.block is not None), default=0)
    experts = 1 + max((r.expert for r in rows if r.expert is not None), default=-1)
    sizes = {"num_hidden_layers": depth, "num_local_experts": experts, "hidden_size": 1, "num_attention_heads": 1}
    found, _ = targets({"model_type": profile.index["family"]} | sizes, [r.name for r in rows if r.role != "embedding"])
    blocks = {r.name: r.block for r in rows}
    measured = {block: profile.curvatures(block) for block in set(blocks.values())}
    entries = {}
    for target in found.values():
        curvatures = [measured[blocks[name]][name] for name in target.sources]
        means = [c.h if c.h.ndim == 1 else c.h.diagonal() for c in curvatures]
        tokens = torch.tensor([float(c.tokens) for c in curvatures])
        entries[target.name] = imatrix.Importance(torch.stack([m.float() for m in means]), tokens)
    text = profile.index["calibration"]
    windows = -(-int(text["tokens"]) // int(text["window"]))
    return imatrix.Imatrix(entries, str(text["source"]), windows, int(text["window"]))
