"""The folder of a model: which shards it has, and what their headers say. Nothing in them is trusted."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

from assay.model.errors import InputError
from assay.model.files import read_json
from assay.model.stored import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000


def resolve(source: str | Path) -> Path:
    """Folder of a local model or of a hub id in the cache. Raises InputError."""
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.exists():
        raise InputError(f"{text} is a file; give the model's folder")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"no model at {text}; give a folder that holds config.json, or a hub id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(text, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise InputError(f"no folder {text}, and the hub did not give {text}: {str(error).splitlines()[0]}") from error


def stamp(shard: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written to or replaced; None where it is gone."""
    try:
        found = shard.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def read_index(folder: Path) -> dict[str, str]:
    """Shard names by tensor; empty where there is no index."""
    if not (folder / INDEX).exists():
        return {}
    shards = read_json(folder / INDEX, "not a model folder").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{folder / INDEX}: weight_map must map tensors to shards; download the model again")
    return shards


def shards(folder: Path, index: dict[str, str]) -> list[Path]:
    """The weight files of a folder. Raises InputError where one is missing or lies elsewhere, and for pickle files."""
    names = sorted(set(index.values()))
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise InputError(f"{INDEX}: shard path {name!r} leaves the folder; the download is not to be trusted")
        if not _is_file(folder / name):
            raise InputError(f"{folder}: shard {name} is missing; download the model again")
    if names:
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise InputError(f"{folder} holds pickle files, which can run code; convert them to safetensors first")
    raise InputError(f"{folder}: not a model folder (no {SINGLE} and no {INDEX})")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_header(shard: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file. Raises InputError where header and file don't fit together."""
    size = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ValueError("header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        infos = {name: _info(shard, entry) for name, entry in header.items()}
        end = 8 + length + _end_of_data(header)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, OverflowError) as error:
        raise InputError(f"{shard.name}: wrong safetensors header ({error}); download the file again") from error
    if end != size:
        raise InputError(f"{shard.name}: {size} bytes where its header needs {end}; download the file again")
    return infos


def _end_of_data(header: dict[str, Any]) -> int:
    """Where the last tensor ends; tensors must follow one another without a gap or an overlap."""
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in header.values()):
        if start != end:
            raise ValueError("tensors overlap or leave a gap")
        end = stop
    return end


def _info(shard: Path, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int for n in (*shape, start, end)):
        raise ValueError("sizes must be whole numbers")
    count = 1
    for n in shape:
        count *= n
    if min(shape, default=0) < 0 or end - start != count * dtype.itemsize:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(shard, dtype, shape, end - start)
