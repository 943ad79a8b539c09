"""Engines: for each, the contract (what it can hold) under its name, and the writers that fulfil it."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import TYPE_CHECKING

from assay.model.errors import InputError

if TYPE_CHECKING:
    from assay.engines.contract import Contract

NAMES = (
    "assay", "awq", "gptq", "gptq-v2", "llama.cpp", "llama.cpp-all", "plain", "transformers", "vllm", "vllm-w8a8",
    "vllm-w8a8-static",
)  # fmt: skip
ALIASES = {"gguf": "llama.cpp"}


def get(name: str) -> Contract:
    """The contract of an engine, `name` or `name@version`. Raises InputError naming the nearest, or what is too old or new."""
    name, _, version = name.partition("@")
    name = ALIASES.get(name, name)
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise InputError(f"unknown engine {name!r}; {hint}")
    contract: Contract = importlib.import_module(f"assay.engines.{re.sub('[.-]', '_', name)}").CONTRACT
    if version:
        _check_version(contract, version)
    return contract


def _check_version(contract: Contract, version: str) -> None:
    """Refuse a version outside those that `since` names of the engine's own program."""
    program = contract.name.partition("-")[0]
    known = re.search(rf"\b{re.escape(program)} ([\d.]+)(?: to ([\d.]+))?", contract.since)
    if known is None:
        raise InputError(f"{contract.name} takes no version ({contract.since})")
    if re.fullmatch(r"\d+(\.\d+)*", version) is None:
        raise InputError(f"{version!r} is no version; write it like {contract.name}@{known[1]}")
    asked, first, last = (tuple(int(n) for n in (v or "").split(".") if n) for v in (version, *known.groups()))
    if asked < first or (last and asked[: len(last)] > last):
        raise InputError(f"{program} {version} does not read what assay writes for {contract.name}; it needs {contract.since}")
