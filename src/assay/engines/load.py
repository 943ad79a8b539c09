"""A result as a transformers model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from assay.engines.convert import convert
from assay.model.checkpoint import Checkpoint


def load(folder: Path) -> Any:
    """The model of a folder through stock transformers, which decodes packed weights at the first forward pass.

    Assay's own layout is decoded first, into a temporary folder.
    """
    from transformers import AutoModelForCausalLM

    source = Checkpoint.open(folder)
    if (source.config.get("quantization_config") or {}).get("quant_method") in (None, "compressed-tensors"):
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
    with tempfile.TemporaryDirectory(prefix="assay-") as work:
        convert(folder, "plain", Path(work) / "plain")
        return AutoModelForCausalLM.from_pretrained(Path(work) / "plain", dtype="auto")
