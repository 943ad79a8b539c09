"""Engines: for each, the contract (what it can hold) under its name, and the writers that fulfil it."""

from __future__ import annotations

import difflib
import importlib

from assay.engines.contract import Contract
from assay.model.errors import InputError

NAMES = ("assay", "awq", "gptq", "gptq-v2", "plain", "transformers", "vllm", "vllm-w8a8")


def get(name: str) -> Contract:
    """The contract of an engine. Raises InputError naming the nearest."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise InputError(f"unknown engine {name!r}; {hint}")
    contract: Contract = importlib.import_module(f"assay.engines.{name.replace('-', '_')}").CONTRACT
    return contract
