"""A Hugging Face checkpoint folder, read lazily: headers first, tensors when asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from assay.model import gguf_file, layouts, memory
from assay.model.errors import InputError
from assay.model.files import read_json
from assay.model.folder import INDEX, read_index, resolve, shards, stamp
from assay.model.layouts.base import Stored
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.shards import read_header, read_tensor
from assay.model.stacked import apart
from assay.model.stored import TensorInfo

HEADER = 96
"""Most bytes that a tensor takes in the header of a safetensors file, beside its name."""
Decoded = TypeVar("Decoded")
SLACK = 64
"""Bytes that a format may save beside its bits a weight."""


class Checkpoint:
    """A read-only folder of tensors plus its config.

    `stored` maps the names in the files; `names` are the logical tensors, in which a compressed weight with its scales
    is one tensor `X.weight` that `read` decodes.
    """

    def __init__(self, folder: Path, config: dict[str, Any], stored: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.config = config
        self.stored = stored
        self._replaced: Mapping[str, Tensor] = {}
        self._stamps = {shard: stamp(shard) for shard in {info.shard for info in stored.values()}}

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
        index = read_index(folder)
        for shard in shards(folder, index):
            for name, info in read_header(shard).items():
                if name in stored:
                    raise InputError(f"{shard.name}: tensor {name} is also in {stored[name].shard.name}; remove one")
                stored[name] = info
        if lost := sorted(set(index) - set(stored)):
            raise InputError(f"{folder}: {INDEX} names {lost[0]}, which no shard holds; download the model again")
        return cls(folder, config, apart(config, stored))

    def replaced(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """This checkpoint as if some stored tensors had other values of the same shape and dtype."""
        other = Checkpoint(self.folder, self.config, self.stored)
        other._replaced, other._stamps = tensors, self._stamps
        return other

    @property
    def method(self) -> str | None:
        """How the weights are compressed: quant_method of the config, "gguf" for a GGUF file; None where it names none."""
        if any(info.shard.suffix == gguf_file.SUFFIX for info in self.stored.values()):
            return "gguf"
        named = (self.config.get("quantization_config") or {}).get("quant_method")
        return None if named is None else str(named)

    @cached_property
    def packed(self) -> dict[str, Stored]:
        """Every logical tensor of which the files hold several parts. Raises InputError for parts that don't fit."""
        return layouts.find(self.config, self.stored)

    @cached_property
    def names(self) -> list[str]:
        """Logical tensor names, sorted."""
        parts = {part for tensor in self.packed.values() for part in tensor.parts.values()}
        return sorted((set(self.stored) - parts) | set(self.packed))

    @cached_property
    def levels(self) -> dict[str, Level]:
        """Level of every weight whose codes are one of our formats, by logical tensor name."""
        return {name: tensor.level for name, tensor in self.packed.items() if tensor.level is not None}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a logical tensor, from headers and shapes that are stored."""
        tensor = self.packed.get(name)
        if tensor is None:
            return self.stored[name].shape
        if tensor.shape is not None:
            return tensor.shape
        part = tensor.parts.get("weight_shape" if tensor.level else "shape")
        if part is None:
            raise InputError(f"{self.folder}: {name} is packed but nothing tells its shape; download the model again")
        noted = self._raw(part)
        shape = tuple(noted.tolist()) if noted.ndim == 1 and not noted.is_floating_point() else (-1,)
        if min(shape, default=0) < 0 or (tensor.level and len(shape) != 2):
            raise InputError(f"{self.folder}: the stored shape of {name} is none; download the model again")
        self._check_room(name, tensor, shape)
        return shape[::-1] if tensor.turned else shape

    def _check_room(self, name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
        """Raises InputError for a stored shape of more weights than the parts can hold, a byte each where they aren't coded."""
        bits = tensor.level.bits if tensor.level else 8
        if math.prod(shape) * bits > 8 * (self.nbytes(name) + SLACK):
            raise InputError(f"{self.folder}: {name} is too small for {list(shape)} weights; download the model again")

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `read` returns."""
        return self.packed[name].dtype if name in self.packed else self.stored[name].dtype

    def turned(self, name: str) -> bool:
        """Whether a packed weight [out, in] is a tensor [in, out] of the model (Conv1D)."""
        return name in self.packed and self.packed[name].turned

    def nbytes(self, name: str) -> int:
        """Stored bytes of a logical tensor, its scales included."""
        return sum(self.stored[part].nbytes for part in self.parts(name))

    def kept_dtype(self, name: str) -> torch.dtype:
        """Dtype in which a logical tensor is written when it stays as it is: one that holds its values exactly."""
        tensor = self.packed.get(name)
        return tensor.kept(self._parts(tensor)) if tensor and tensor.kept else self.dtype(name)

    def kept_nbytes(self, name: str) -> int:
        """Bytes of a logical tensor when it stays: its own, or those of its decoded values where it has scales."""
        if len(self.parts(name)) == 1 and (name not in self.stored or self.stored[name].read is None):
            return self.nbytes(name)
        return math.prod(self.shape(name)) * self.kept_dtype(name).itemsize

    def parts(self, name: str) -> list[str]:
        """Names of the stored tensors that make up a logical one."""
        return list(self.packed[name].parts.values()) if name in self.packed else [name]

    def read(self, name: str) -> Tensor:
        """One logical tensor, decoded, in memory of its own. Raises InputError if it isn't there."""
        tensor = self.packed.get(name)
        if tensor is not None:
            value = self._decoded(name, tensor.decode, tensor)
            if value.shape != self.shape(name):
                raise InputError(f"{name}: decodes to {list(value.shape)} instead of {list(self.shape(name))}; download it again")
            return value
        if name not in self.stored:
            raise InputError(f"{self.folder}: tensor {name} is missing from the weight files; download the model again")
        return self._raw(name)

    def read_packed(self, name: str) -> Packed:
        """A compressed weight in its stored form."""
        tensor = self.packed.get(name)
        if tensor is None or tensor.restore is None:
            raise InputError(f"{self.folder}: {name} is not stored in a format of assay's")
        return self._decoded(name, tensor.restore, tensor)

    def mapped(self, name: str) -> Callable[[], Packed]:
        """A function that makes a compressed weight from views of the files, which take no memory while they aren't read."""
        tensor, parts = self.packed[name], {}
        for suffix, part in tensor.parts.items():
            with safe_open(self.stored[part].shard, framework="pt") as file:
                parts[suffix] = file.get_tensor(part)
        assert tensor.restore is not None
        return partial(tensor.restore, parts)

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
        headers += sum(HEADER + len(name) for name, info in self.stored.items() if info.renamed)
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

    def _decoded(self, name: str, decode: Callable[[Mapping[str, Tensor]], Decoded], tensor: Stored) -> Decoded:
        parts = self._parts(tensor)
        _ = self.shape(name)
        try:
            return decode(parts)
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError, ArithmeticError, AssertionError) as error:
            if memory.lacked(error):
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
            raise InputError(f"{name}: its stored parts don't fit together ({reason}); download the model again") from error

    def _parts(self, tensor: Stored) -> dict[str, Tensor]:
        return {suffix: self._raw(name) for suffix, name in tensor.parts.items()}

    def check_unchanged(self, shard: Path) -> None:
        """Raises InputError where a weight file is no longer the one that was opened."""
        if stamp(shard) != self._stamps[shard]:
            raise InputError(f"{shard}: changed while it was read; let no other program write to it, and run this again")

    def _raw(self, name: str) -> Tensor:
        if name in self._replaced:
            return self._replaced[name].clone()
        info = self.stored[name]
        self.check_unchanged(info.shard)
        if info.read is not None:
            return info.read()
        try:
            value = read_tensor(info)
            self.check_unchanged(info.shard)
            return value
        except OSError as error:
            raise InputError(f"{info.shard.name}: can't read {name} ({error}); download the file again") from error
