"""Facts about model families, as data: no code per family."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

CACHED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Families whose attention rotates keys, updates one cache layer, and calls the attention function that the config names."""


@cache
def facts() -> dict[str, Any]:
    """The table of families."""
    return json.loads(resources.files("assay.model.arch").joinpath("families.json").read_text())
