"""Durable files: a file has its old content or its new one, whatever happens in between, and bits that flip later show."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from assay.model.errors import InputError
from assay.model.threads import side_by_side

CHECKS = "checks"
PIECE = 1 << 22
"""Bytes that one thread sums."""


def save_text(path: Path, text: str) -> None:
    """Write text durably."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _settle(partial, path)


def save_json(path: Path, value: Any) -> None:
    """Write JSON durably, keys sorted."""
    save_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def save_note(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object durably, with a checksum of its own, for `read_note`."""
    save_json(path, dict(value) | {CHECKS: _sum_of(value)})


def read_note(path: Path, problem: str) -> dict[str, Any]:
    """What `save_note` wrote. Raises InputError naming `problem` where the file is missing, and where it has changed since."""
    try:
        value = read_json(path, problem)
    except InputError:
        if not path.exists():
            raise
        raise damaged(path, "it is no JSON object") from None
    if value.pop(CHECKS, None) != _sum_of(value):
        raise damaged(path, "its checksum is wrong")
    return value


def read_json(path: Path, problem: str) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError naming `problem`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: {problem} ({path.name} is missing)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file durably, with a checksum of every tensor and of the metadata."""
    partial, notes = path.with_name(path.name + ".partial"), dict(metadata or {})
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checks = [_sum_of(notes), {name: checksum(tensor) for name, tensor in held.items()}]
    write_safetensors(partial, held, notes | {CHECKS: json.dumps(checks)})
    _settle(partial, path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises OSError, with its number, where the disk refuses."""
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        found = re.search(r"(?:code:|os error) (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


class Tensors(Mapping[str, Tensor]):
    """An open file of `save_tensors`. Each tensor is compared with its checksum when it is read, its memory the file's.

    metadata: as it was saved. Raises InputError for a file that has changed since, and for a tensor that isn't there.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self.metadata = dict(file.metadata() or {})
        try:
            notes, self._checks = json.loads(self.metadata.pop(CHECKS, "null"))
        except (ValueError, TypeError, RecursionError):
            raise damaged(path, "it has no checksums") from None
        if not isinstance(self._checks, dict) or set(self._checks) != set(file.keys()) or notes != _sum_of(self.metadata):
            raise damaged(path, "its header has changed")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._checks:
            raise damaged(self._path, f"it lacks {name}")
        tensor: Tensor = self._file.get_tensor(name)
        if checksum(tensor) != self._checks[name]:
            raise damaged(self._path, f"the checksum of {name} is wrong")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._checks)

    def __len__(self) -> int:
        return len(self._checks)

    def __contains__(self, name: object) -> bool:
        return name in self._checks


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """The tensors of a file while it is open. Raises InputError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            yield Tensors(path, file)
    except (SafetensorError, FileNotFoundError) as error:
        raise damaged(path, " ".join(str(error).split())) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of `save_tensors`, in memory of their own. Raises InputError for a damaged one."""
    with open_tensors(path) as file:
        return {name: tensor.clone() for name, tensor in file.items()}


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's dtype, shape and the CRC-32 of its pieces: every change of up to 32 bits in a row shows."""
    raw = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    sums = side_by_side(lambda start: zlib.crc32(raw[start : start + PIECE]), range(0, len(raw), PIECE), 0)
    return zlib.crc32(f"{tensor.dtype}{list(tensor.shape)}{sums}".encode())


def damaged(path: Path, reason: str) -> InputError:
    """What to raise for a file of unfinished or finished work that is not what was written."""
    return InputError(f"{path}: damaged ({reason}); remove {path.parent} and run what made it again")


@contextmanager
def unless_refused(folder: Path, fresh: bool) -> Iterator[None]:
    """Removes a folder that is new when the work on it ends in an InputError."""
    try:
        yield
    except InputError:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _sum_of(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
