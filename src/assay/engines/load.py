"""A result as a transformers model, or in another layout."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from assay.engines import get, write
from assay.engines.gguf import reopen as gguf_reopen
from assay.engines.gguf import write as gguf_write
from assay.engines.gguf.exact import as_blocks
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError


def load(folder: Path) -> Any:
    """The model of a folder through stock transformers, which decodes packed weights at the first forward pass.

    Assay's own layout and GGUF are decoded first, into a temporary folder.
    """
    from transformers import AutoModelForCausalLM

    source = Checkpoint.open(folder)
    own = (source.config.get("quantization_config") or {}).get("quant_method") == "assay"
    if not own and all(info.read is None for info in source.stored.values()):
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    with tempfile.TemporaryDirectory(prefix="assay-") as work:
        export(folder, "plain", Path(work) / "plain")
        return AutoModelForCausalLM.from_pretrained(Path(work) / "plain", dtype="auto")


def export(folder: Path, to: str, destination: Path) -> None:
    """Write a packed result as `plain` decoded weights, as `gguf`, or copy it as `compressed-tensors`. Raises InputError."""
    source = Checkpoint.open(folder)
    if to == "compressed-tensors":
        if (source.config.get("quantization_config") or {}).get("quant_method") != "compressed-tensors":
            raise InputError(f"{folder} is not in that layout; compress it for transformers or vllm instead")
        write.check_space(destination.absolute().parent, source.weight_bytes)
        with write.new_folder(destination) as folder:
            shutil.copytree(source.folder, folder, dirs_exist_ok=True)
        return
    packed = {name: partial(source.read_packed, name) for name in source.levels}
    turned = frozenset(name for name in source.levels if source.turned(name))
    if to == "gguf":
        _export_gguf(source, packed, destination)
        return
    if to != "plain":
        raise InputError(f"unknown layout {to!r}; there are plain, compressed-tensors and gguf")
    write.write(destination, source, packed, get("plain"), {}, source.levels, turned)


def _export_gguf(source: Checkpoint, packed: write.Loaders, destination: Path) -> None:
    """Float weights as they are, packed ones with the same codes and scales."""
    blocks, levels = as_blocks(packed)
    loaders = {name: partial(blocks.__getitem__, name) for name in blocks}
    gguf_write.write(destination, source, loaders, get("gguf"), {}, levels)
    try:
        gguf_reopen.compare(destination, source, loaders, get("gguf"))
    except ShortfallError:
        shutil.rmtree(destination)
        raise
