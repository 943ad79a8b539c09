"""Writes a result folder: new, complete, durable, or not at all."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from assay.engines.contract import Contract
from assay.engines.layout import LAYOUTS
from assay.model import sums
from assay.model.checkpoint import Checkpoint
from assay.model.dfloat11 import PackedBfloat16
from assay.model.errors import InputError
from assay.model.files import write_safetensors
from assay.model.folder import INDEX, SINGLE
from assay.model.layouts.compressed_tensors import CACHE_SCALES, CACHE_SCHEME, kept_experts
from assay.model.level import Level
from assay.model.lock import made_alone
from assay.model.packed import Packed
from assay.model.terms import decoded

SHARD_BYTES = 500_000_000
HEADROOM = 16_000_000
OF_OTHER_WEIGHTS = ("hf_quant_config.json", "quantize_config.json")
"""What a source may say of its weights' layout beside config.json; a result's are in another."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Loaders = Mapping[str, Callable[[], Packed]]


def write(
    destination: Path, source: Checkpoint, packed: Loaders, contract: Contract, extra_files: Mapping[str, str],
    levels: Mapping[str, Level], transposed: frozenset[str] = frozenset(), shard_bytes: int = SHARD_BYTES,
    ordered: frozenset[str] = frozenset(), added: Mapping[str, Tensor] = NOTHING,
) -> None:  # fmt: skip
    """Write the compressed model and all side files into `destination`, which must not exist.

    packed: loaders by logical tensor name; every other tensor is copied byte for byte; ordered: those whose groups are
    not neighbours; added: further tensors by name. Raises InputError when the disk is too small; leaves nothing behind
    when anything fails.
    """
    check_space(destination.absolute().parent, _expected_bytes(source, levels, contract, transposed))
    tensors = (output_tensors(source, name, packed, contract, transposed) for name in source.names)
    with new_folder(destination) as folder:
        write_shards(folder, itertools.chain(tensors, [added] if added else []), shard_bytes)
        copy_side_files(folder, source)
        _write_config(folder, source, contract, levels, transposed, ordered, added)
        for name, text in extra_files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `destination`, complete and durable, or goes if anything fails."""
    partial = destination.absolute().with_name(f".{destination.name}.partial")
    with made_alone(partial):
        try:
            yield partial
            sums.write(partial)
            for path in sorted(partial.rglob("*")):
                _sync(path)
            _sync(partial)
            if destination.exists():
                raise InputError(f"{destination} exists by now; choose another folder or remove it")
            os.rename(partial, destination)
            _sync(destination.absolute().parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def own_config(source: Checkpoint, levels: Mapping[str, Level], transposed: frozenset[str]) -> dict[str, Any]:
    """What assay needs to read its own layout back."""
    facts = {
        name: {
            "level": level.name,
            "dtype": str(source.dtype(name)).removeprefix("torch."),
            "transposed": name in transposed,
        }
        for name, level in sorted(levels.items())
    }
    return {"quant_method": "assay", "weights": facts}


def output_tensors(
    source: Checkpoint, name: str, packed: Loaders, contract: Contract, transposed: frozenset[str]
) -> dict[str, Tensor]:
    """What one logical tensor of the source becomes in the files."""
    if name in packed:
        result = packed[name]()
        if contract.layout != "plain":
            stored = LAYOUTS[contract.layout].tensors(result)
            return {name.removesuffix("weight") + suffix: t for suffix, t in stored.items()}
        weight = decoded(name, result).to(source.dtype(name))
        return {name: weight.T.contiguous() if name in transposed else weight}
    if len(source.parts(name)) > 1:
        stored = {name: source.read(name).to(source.kept_dtype(name))}
    else:
        stored = dict(source.iter_raw([name]))
    return _lossless(name, stored[name]) if contract.layout == "assay" else stored


def _lossless(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as it stays in assay's own layout: bf16 without its redundant exponent bits, where that is smaller."""
    if tensor.dtype == torch.bfloat16:
        smaller = PackedBfloat16.encode(tensor)
        if smaller.nbytes < tensor.nbytes:
            return {f"{name}.{part}": t for part, t in smaller.tensors().items()}
    return {name: tensor}


def kept_nbytes(source: Checkpoint, name: str, contract: Contract) -> int:
    """Bytes of a tensor that is not compressed, as it will be stored."""
    if contract.layout != "assay":
        return source.kept_nbytes(name)
    return sum(t.nbytes for t in output_tensors(source, name, {}, contract, frozenset()).values())


def plain_nbytes(source: Checkpoint, name: str) -> int:
    """Bytes of a decoded weight."""
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def write_shards(folder: Path, tensors: Iterable[Mapping[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as they come, in as many safetensors files as needed, with an index where there are several."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        write_safetensors(folder / f"part-{len(shards):05d}", shard, {"format": "pt"})
        shards.append(sorted(shard))
        total += sum(t.nbytes for t in shard.values())
    if len(shards) == 1:
        (folder / "part-00000").rename(folder / SINGLE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index:05d}").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index_text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index_text, indent=2) + "\n", encoding="utf-8")


def _shards(parts: Iterable[Mapping[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for tensors in parts:
        extra = sum(t.nbytes for t in tensors.values())
        if shard and size + extra > limit:
            yield shard
            shard, size = {}, 0
        shard |= tensors
        size += extra
    yield shard


def copy_side_files(folder: Path, source: Checkpoint) -> None:
    """Copy all that belongs to a model beside weights and config; not what is said of its weights or an earlier step."""
    for path in source.side_files():
        target = folder / path.relative_to(source.folder)
        if target.parts[len(folder.parts)] == "assay" or path.name in OF_OTHER_WEIGHTS:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _write_config(
    folder: Path, source: Checkpoint, contract: Contract, levels: Mapping[str, Level], transposed: frozenset[str],
    ordered: frozenset[str], added: Mapping[str, Tensor],
) -> None:  # fmt: skip
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if contract.layout == "assay":
        config["quantization_config"] = own_config(source, levels, transposed)
    elif (describe := LAYOUTS[contract.layout].config) and levels:
        linear = [n.removesuffix(".weight") for n in source.names if n.endswith(".weight") and n not in levels]
        kept = [n for n in linear if len(source.shape(f"{n}.weight")) == 2 and "embed" not in n]
        config["quantization_config"] = describe(levels, kept, ordered)
        cache = (source.config.get("quantization_config") or {}).get("kv_cache_scheme")
        if any(name.endswith(CACHE_SCALES) for name in added):
            cache = dict(CACHE_SCHEME)
        if config["quantization_config"]["quant_method"] == "compressed-tensors":
            config["quantization_config"]["ignore"] += kept_experts(source.names, levels)
            config["quantization_config"]["kv_cache_scheme"] = cache
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _expected_bytes(source: Checkpoint, levels: Mapping[str, Level], contract: Contract, transposed: frozenset[str]) -> int:
    need = 0
    for name in source.names:
        if name not in levels:
            need += source.kept_nbytes(name)
        elif contract.layout == "plain":
            need += plain_nbytes(source, name)
        else:
            rows, columns = source.shape(name)[:: -1 if name in transposed else 1]
            need += contract.nbytes(levels[name], rows, columns, 4)
    return need


def check_space(folder: Path, nbytes: int) -> None:
    """Refuse a disk that can't take `nbytes` of weights and some side files. Raises InputError."""
    need, free = nbytes + HEADROOM, shutil.disk_usage(folder).free
    if free < need:
        wanted = f"{free / 1e6:,.0f} MB free where the result needs {need / 1e6:,.0f} MB"
        raise InputError(f"{folder}: {wanted}; free some or choose a folder on another disk")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
