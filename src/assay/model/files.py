"""Durable files: a file either has its old content or its new one, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.model.errors import InputError


def save_text(path: Path, text: str) -> None:
    """Write text durably."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _settle(partial, path)


def save_json(path: Path, value: Any) -> None:
    """Write JSON durably, keys sorted."""
    save_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file durably."""
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, dict(metadata or {}))
    _settle(partial, path)


@contextmanager
def unless_refused(folder: Path) -> Iterator[None]:
    """Removes a folder that wasn't there before when the work on it ends in an InputError."""
    fresh = not folder.exists()
    try:
        yield
    except InputError:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
