"""A Hugging Face checkpoint folder, read lazily: headers first, tensors when asked for."""

from __future__ import annotations

import hashlib
import json
import math
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
from assay.model.folder import INDEX, read_header, read_index, resolve, shards, stamp
from assay.model.ggml import KINDS
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.schema import Shape, conform
from assay.model.scheme import own_weights, packed_levels, torch_dtype
from assay.model.stored import TensorInfo
from assay.model.terms import SUFFIXES, decoded, restored

_FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
SLACK = 64
"""Bytes by which a packed weight of another program may be smaller than ours: its shape may be stored in fewer."""


class Checkpoint:
    """A read-only folder of tensors plus its config.

    `stored` maps the names in the files; `names` are the logical tensors, in which a packed or
    FP8 weight with its scales is one tensor `X.weight` that `read` decodes.
    """

    def __init__(self, folder: Path, config: dict[str, Any], stored: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.config = config
        self.stored = stored
        self._levels = packed_levels(config)
        self._own = own_weights(config)
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
            elif name.endswith(f".{PARTS[0]}") and self._lossless(whole := name.removesuffix(f".{PARTS[0]}")):
                logical -= {f"{whole}.{part}" for part in PARTS}
                logical.add(whole)
            elif self._fp8_scale(name):
                logical.discard(self._fp8_scale(name))
        return sorted(logical)

    @cached_property
    def levels(self) -> dict[str, Level]:
        """Level of every packed weight, by logical tensor name."""
        named = {f"{m}.weight": level for m, level in self._levels.items()}
        named |= {name: Level.parse(facts["level"]) for name, facts in self._own.items()}
        return {name: level for name, level in named.items() if f"{name}_packed" in self.stored}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a logical tensor, from headers alone (packed weights: out from scales, in from level)."""
        if name in self.stored:
            return self.stored[name].shape
        if self._lossless(name):
            return self._noted_shape(f"{name}.shape")
        if f"{name}_shape" not in self.stored:
            shape = self._blocks_shape(name)
        else:
            shape = self._noted_shape(f"{name}_shape", 2)
        return shape[::-1] if self.turned(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `read` returns."""
        if name in self.stored:
            return torch.float32 if self._fp8_scale(name) else self.stored[name].dtype
        if self._lossless(name):
            return torch.bfloat16
        if name in self._own:
            return torch.float32 if self._own[name]["level"] in KINDS else torch_dtype(self._own[name]["dtype"])
        if f"{name}_scale" not in self.stored:
            raise InputError(f"{self.folder}: {name} is packed but has no scales; download the model again")
        return self.stored[f"{name}_scale"].dtype

    def turned(self, name: str) -> bool:
        """Whether a packed weight [out, in] is a tensor [in, out] of the model (Conv1D)."""
        return name in self._own and self._own[name]["transposed"]

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
        weight = decoded(name, self.read_packed(name))
        return weight.T.contiguous() if self.turned(name) else weight

    def read_packed(self, name: str) -> Packed:
        """A packed weight in its stored form."""
        level, shape, dtype = self._level(name), self.shape(name), self.dtype(name)
        rows, columns = shape[::-1] if self.turned(name) else shape
        if level.nbytes(rows, columns, dtype.itemsize) > self.nbytes(name) + SLACK:
            raise InputError(f"{self.folder}: {name} is too small for {rows} x {columns} weights; download the model again")
        stored = {part.removeprefix(name.removesuffix("weight")): self._raw(part) for part in self.parts(name)}
        return restored(name, stored, level, dtype)

    def _level(self, name: str) -> Level:
        if name not in self.levels:
            raise InputError(f"{self.folder}: config.json gives no quantization scheme for {name}")
        return self.levels[name]

    def _blocks_shape(self, name: str) -> tuple[int, ...]:
        """Of a weight in ggml's blocks, from the bytes of its rows."""
        kind, stored = KINDS.get(self._level(name).format), self.stored[f"{name}_packed"].shape
        if kind is None or len(stored) != 2:
            raise InputError(f"{self.folder}: {name} is packed but nothing tells its shape; download the model again")
        return stored[0], kind.columns(stored[1])

    def _noted_shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """A shape that is stored as a tensor."""
        noted = self._raw(name)
        shape = tuple(noted.tolist()) if noted.ndim == 1 and not noted.is_floating_point() else (-1,)
        if min(shape, default=0) < 0 or math.prod(shape) >= 1 << 48 or dimensions not in (None, len(shape)):
            raise InputError(f"{self.folder}: {name} holds no shape; download the model again")
        return shape

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
        if stamp(shard) != self._stamps[shard]:
            raise InputError(f"{shard}: changed while it was read; let no other program write to it, and run this again")

    def _lossless(self, name: str) -> bool:
        """Whether a tensor is stored as `PackedBfloat16`."""
        return name not in self.stored and all(f"{name}.{part}" in self.stored for part in PARTS)

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
            conform(blocks, Shape, f"{self.folder / 'config.json'}: weight_block_size must be two sizes")
            if weight.ndim != 2 or list(scale.shape) != [-(-n // b) for n, b in zip(weight.shape, blocks, strict=True)]:
                shapes = f"{list(scale.shape)} scales for {list(weight.shape)} weights"
                raise InputError(f"{name}: {shapes} in blocks of {blocks}; download the model again")
            scale = scale.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
            scale = scale[: weight.shape[0], : weight.shape[1]]
        try:
            return weight * scale
        except RuntimeError:
            shapes = f"{list(scale.shape)} scales for {list(weight.shape)} weights"
            raise InputError(f"{name}: {shapes}; download the model again") from None
