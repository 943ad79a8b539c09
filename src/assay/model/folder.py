"""The folder of a model: where it is and which shards it has. Nothing in it is trusted."""

from __future__ import annotations

import os
from pathlib import Path

from assay.model.errors import InputError
from assay.model.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
