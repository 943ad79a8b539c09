"""A Hugging Face checkpoint folder, read lazily: headers first, tensors when asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assay.model import gguf_file
from assay.model.dfloat11 import PARTS, PackedBfloat16
from assay.model.errors import InputError
from assay.model.files import read_json
from assay.model.ggml import KINDS
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.stored import TensorInfo
from assay.model.terms import SUFFIXES, restore

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_MAX_HEADER = 100_000_000


class Checkpoint:
    """A read-only folder of tensors plus its config.

    `stored` maps the names in the files; `names` are the logical tensors, in which a packed or
    FP8 weight with its scales is one tensor `X.weight` that `read` decodes.
    """

    def __init__(self, folder: Path, config: dict[str, Any], stored: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.config = config
        self.stored = stored
        self._levels = _packed_levels(config)
        self._own: dict[str, dict[str, Any]] = _own_weights(config)
        self._replaced: Mapping[str, Tensor] = {}
        self._stamps = {shard: _stamp(shard) for shard in {info.shard for info in stored.values()}}

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a folder, a GGUF file or a hub id (downloaded by huggingface_hub). Raises InputError."""
        if (path := gguf_file.find(source)) is not None:
            beside = path.parent / "config.json"
            config = read_json(beside, "not a model folder") if beside.exists() else None
            return cls(path.parent, *gguf_file.read(path, config))
        folder = resolve(source)
        config = read_json(folder / "config.json", "not a model folder")
        stored: dict[str, TensorInfo] = {}
        index = _index(folder)
        for shard in _shards(folder, index):
            for name, info in _read_header(shard).items():
                if name in stored:
                    raise InputError(f"{shard.name}: tensor {name} is also in {stored[name].shard.name}; remove one")
                stored[name] = info
        if lost := sorted(set(index) - set(stored)):
            raise InputError(f"{folder}: {INDEX} names {lost[0]}, which no shard holds; download the model again")
        return cls(folder, config, stored)

    def replaced(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """This checkpoint as if some stored tensors had other values of the same shape and dtype."""
        other = Checkpoint(self.folder, self.config, self.stored)
        other._replaced, other._stamps = tensors, self._stamps
        return other

    @cached_property
    def names(self) -> list[str]:
        """Logical tensor names, sorted."""
        logical = set(self.stored)
        for name in self.stored:
            if name.endswith(".weight_packed"):
                module = name.removesuffix(".weight_packed")
                logical -= {f"{module}.{suffix}" for suffix in SUFFIXES}
                logical.add(f"{module}.weight")
            elif name.endswith(f".{PARTS[0]}") and f"{name.removesuffix(PARTS[0])}{PARTS[1]}" in self.stored:
                whole = name.removesuffix(f".{PARTS[0]}")
                logical -= {f"{whole}.{part}" for part in PARTS}
                logical.add(whole)
            elif self._fp8_scale(name):
                logical.discard(self._fp8_scale(name))
        return sorted(logical)

    @cached_property
    def levels(self) -> dict[str, Level]:
        """Level of every packed weight, by logical tensor name."""
        named = {f"{m}.weight": level for m, level in self._levels.items()}
        named |= {name: Level.parse(str(facts["level"])) for name, facts in self._own.items()}
        return {name: level for name, level in named.items() if f"{name}_packed" in self.stored}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a logical tensor, from headers alone (packed weights: out from scales, in from level)."""
        if name in self.stored:
            return self.stored[name].shape
        if self._lossless(name):
            return tuple(int(n) for n in self._raw(f"{name}.shape"))
        if f"{name}_shape" not in self.stored:
            rows, nbytes = self.stored[f"{name}_packed"].shape
            shape: tuple[int, ...] = (rows, KINDS[self.levels[name].format].columns(nbytes))
        else:
            shape = tuple(int(n) for n in self._raw(f"{name}_shape"))
        return shape[::-1] if self.turned(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `read` returns."""
        if name in self.stored:
            return torch.float32 if self._fp8_scale(name) else self.stored[name].dtype
        if self._lossless(name):
            return torch.bfloat16
        if name in self._own:
            return torch.float32 if self._own[name]["level"] in KINDS else _torch_dtype(self._own[name]["dtype"])
        return self.stored[f"{name}_scale"].dtype

    def turned(self, name: str) -> bool:
        """Whether a packed weight [out, in] is a tensor [in, out] of the model (Conv1D)."""
        return bool(self._own.get(name, {}).get("transposed"))

    def nbytes(self, name: str) -> int:
        """Stored bytes of a logical tensor, its scales included."""
        return sum(self.stored[part].nbytes for part in self.parts(name))

    def kept_dtype(self, name: str) -> torch.dtype:
        """Dtype in which a logical tensor is written when it stays as it is: one that holds its values exactly."""
        scale = self._fp8_scale(name) if name in self.stored else None
        if scale is None:
            return self.dtype(name)
        mantissas = torch.frexp(self._raw(scale).float()).mantissa
        return torch.bfloat16 if bool((mantissas.abs() == 0.5).all()) else torch.float32

    def kept_nbytes(self, name: str) -> int:
        """Bytes of a logical tensor when it stays: its own, or those of its decoded values where it has scales."""
        if len(self.parts(name)) == 1 and (name not in self.stored or self.stored[name].read is None):
            return self.nbytes(name)
        return math.prod(self.shape(name)) * self.kept_dtype(name).itemsize

    def parts(self, name: str) -> list[str]:
        """Names of the stored tensors that make up a logical one."""
        if name in self.stored:
            scale = self._fp8_scale(name)
            return [name, scale] if scale else [name]
        if self._lossless(name):
            return [f"{name}.{part}" for part in PARTS]
        module = name.removesuffix("weight")
        return [module + s for s in SUFFIXES if module + s in self.stored]

    def read(self, name: str) -> Tensor:
        """One logical tensor, decoded, in memory of its own. Raises InputError if it isn't there."""
        if name in self.stored:
            return self._decode_fp8(name) if self._fp8_scale(name) else self._raw(name)
        if self._lossless(name):
            return PackedBfloat16.from_tensors({part: self._raw(f"{name}.{part}") for part in PARTS}).decode()
        if f"{name}_packed" not in self.stored:
            raise InputError(f"{self.folder}: tensor {name} is missing from the weight files; download the model again")
        weight = self.read_packed(name).decode()
        return weight.T.contiguous() if self.turned(name) else weight

    def read_packed(self, name: str) -> Packed:
        """A packed weight in its stored form."""
        level = self.levels.get(name)
        if level is None:
            raise InputError(f"{self.folder}: config.json gives no quantization scheme for {name}")
        stored = {part.removeprefix(name.removesuffix("weight")): self._raw(part) for part in self.parts(name)}
        return restore(stored, level, self.dtype(name))

    def iter_raw(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors one at a time, byte for byte."""
        for name in names:
            yield name, self._raw(name)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(p.stat().st_size for p in {i.shard for i in self.stored.values()})

    @cached_property
    def kept_file_bytes(self) -> int:
        """Bytes of all weight files if every tensor stays."""
        headers = self.weight_bytes - sum(info.nbytes for info in self.stored.values())
        return headers + sum(self.kept_nbytes(name) for name in self.names)

    def side_files(self) -> list[Path]:
        """Every file a user needs beside the weights: all but weights, indexes and hidden files.

        None beside a lone GGUF file, whose folder may be any.
        """
        if not (self.folder / "config.json").exists():
            return []
        weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
        files = (p for p in sorted(self.folder.rglob("*")) if p.is_file())
        return [
            p for p in files
            if p.suffix not in weights and not p.name.endswith(".index.json") and p.name != "config.json"
            and not any(part.startswith(".") for part in p.relative_to(self.folder).parts)
        ]  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config, every header and samples of every shard's bytes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in sorted({i.shard for i in self.stored.values()}):
            size = shard.stat().st_size
            with shard.open("rb") as file:
                for k in range(32):
                    file.seek(k * max(size - 65536, 0) // 31)
                    digest.update(file.read(65536))
            digest.update(f"{shard.name}:{size}".encode())
        return digest.hexdigest()[:32]

    def check_unchanged(self, shard: Path) -> None:
        """Raises InputError where a weight file is no longer the one that was opened."""
        if _stamp(shard) != self._stamps[shard]:
            raise InputError(f"{shard}: changed while it was read; let no other program write to it, and run this again")

    def _lossless(self, name: str) -> bool:
        """Whether a tensor is stored as `PackedBfloat16`."""
        return name not in self.stored and f"{name}.{PARTS[0]}" in self.stored

    def _raw(self, name: str) -> Tensor:
        if name in self._replaced:
            return self._replaced[name].clone()
        info = self.stored[name]
        self.check_unchanged(info.shard)
        if info.read is not None:
            return info.read()
        try:
            with safe_open(info.shard, framework="pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{info.shard.name}: can't read {name} ({error}); download the file again") from error

    def _fp8_scale(self, name: str) -> str | None:
        info = self.stored.get(name)
        if info is None or info.dtype not in _FP8:
            return None
        return next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in self.stored), None)

    def _decode_fp8(self, name: str) -> Tensor:
        weight = self._raw(name).to(torch.float32)
        scale = self._raw(self._fp8_scale(name) or "").to(torch.float32)
        if scale.ndim == 2 and scale.shape != (weight.shape[0], 1):
            blocks = (self.config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
            if list(scale.shape) != [-(-n // b) for n, b in zip(weight.shape, blocks, strict=True)]:
                shapes = f"{list(scale.shape)} scales for {list(weight.shape)} weights"
                raise InputError(f"{name}: {shapes} in blocks of {blocks}; download the model again")
            scale = scale.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
            scale = scale[: weight.shape[0], : weight.shape[1]]
        return weight * scale


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


def _stamp(shard: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written to or replaced; None where it is gone."""
    try:
        found = shard.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _index(folder: Path) -> dict[str, str]:
    """Shard names by tensor; empty where there is no index."""
    if not (folder / INDEX).exists():
        return {}
    shards = read_json(folder / INDEX, "not a model folder").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{folder / INDEX}: weight_map must map tensors to shards; download the model again")
    return shards


def _shards(folder: Path, index: dict[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise InputError(f"{INDEX}: shard path {name!r} leaves the folder; the download is not to be trusted")
        if not (folder / name).is_file():
            raise InputError(f"{folder}: shard {name} is missing; download the model again")
    if names:
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise InputError(f"{folder} holds pickle files, which can run code; convert them to safetensors first")
    raise InputError(f"{folder}: not a model folder (no {SINGLE} and no {INDEX})")


def _read_header(shard: Path) -> dict[str, TensorInfo]:
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
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
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
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    start, end = entry["data_offsets"]
    count = 1
    for n in shape:
        count *= n
    if min(shape, default=0) < 0 or end - start != count * dtype.itemsize:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(shard, dtype, shape, end - start)


def _packed_levels(config: dict[str, Any]) -> dict[str, Level]:
    """Level of every module that `quantization_config` names outright (as our writer does)."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "compressed-tensors":
        return {}
    levels = {}
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("type") != "int":
            continue
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        level = Level(int(weights["num_bits"]), size, bool(weights["symmetric"]))
        levels.update(dict.fromkeys(group.get("targets", []), level))
    return levels


def _own_weights(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Facts of every weight in assay's own layout: level, dtype, transposed."""
    quantization = config.get("quantization_config") or {}
    return dict(quantization["weights"]) if quantization.get("quant_method") == "assay" else {}


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"config.json names the dtype {name!r}, which torch doesn't have")
    return dtype
