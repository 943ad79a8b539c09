"""Writes a result as one GGUF file, with the small files of the source beside it."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from assay.engines.contract import Contract
from assay.engines.gguf.metadata import add_model, rope_tensors
from assay.engines.gguf.tokens import vocabulary
from assay.engines.write import Loaders, check_space, copy_side_files, new_folder
from assay.model.blocks import PackedBlocks
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.gguf_layout import Target, family, targets
from assay.model.level import Level
from assay.model.sites import load_config

FILE = "model.gguf"
PLAIN = {torch.bfloat16: GGMLQuantizationType.BF16, torch.float16: GGMLQuantizationType.F16}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. shape: as in torch."""

    target: Target
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def write(
    destination: Path, source: Checkpoint, packed: Loaders, contract: Contract, extra_files: Mapping[str, str],
    levels: Mapping[str, Level], transposed: frozenset[str] = frozenset(),
) -> None:  # fmt: skip
    """Write `model.gguf` and the side files into `destination`, which must not exist.

    packed: loaders of weights in ggml's blocks by logical tensor name; every other tensor keeps its values. Raises
    InputError when the disk is too small, or for a model that GGUF can't hold; leaves nothing behind when anything fails.
    """
    entries = layout(source, levels)
    check_space(destination.absolute().parent, sum(e.nbytes for e in entries))
    with new_folder(destination) as folder:
        write_file(folder / FILE, source, packed, entries)
        copy_side_files(folder, source)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, text in extra_files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def layout(source: Checkpoint, levels: Mapping[str, Level]) -> list[Entry]:
    """What the file will hold, in order. Raises InputError."""
    found, _ = targets(load_config(source).to_dict(), source.names)
    return [_entry(source, target, levels) for target in found.values()]


def _entry(source: Checkpoint, target: Target, levels: Mapping[str, Level]) -> Entry:
    shapes = {source.shape(name) for name in target.sources}
    kinds = {levels[name].format if name in levels else None for name in target.sources}
    if len(shapes) > 1 or len(kinds) > 1:
        raise InputError(f"{', '.join(target.sources)} are one tensor of a GGUF file: give them one level")
    shape, kind = shapes.pop(), kinds.pop()
    shape = shape[::-1] if target.turned else shape
    stack = (len(target.sources), *shape) if target.stacked else shape
    if kind is not None:
        return Entry(target, GGMLQuantizationType[kind.upper()], stack)
    if len(shape) < 2 or target.whole or target.offset:
        return Entry(target, GGMLQuantizationType.F32, stack)
    return Entry(target, PLAIN.get(source.kept_dtype(target.sources[0]), GGMLQuantizationType.F32), stack)


def sizes(source: Checkpoint, levels: Mapping[str, Level]) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes that each tensor of the source takes in the file, and why some are left out."""
    found = {name: e.nbytes // len(e.target.sources) for e in layout(source, levels) for name in e.target.sources}
    return found, targets(load_config(source).to_dict(), source.names)[1]


def whole_bytes(source: Checkpoint) -> tuple[int, int]:
    """Bytes of the file, and of the tensors in it, if every tensor stays. Raises InputError."""
    entries = layout(source, {})
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        writer, extra = _begin(Path(folder) / FILE, source, entries)
        writer.close()
        head = (Path(folder) / FILE).stat().st_size
    data = [a.nbytes for a in extra.values()] + [e.nbytes for e in entries]
    return _padded(head) + sum(map(_padded, data)), sum(data)


def _padded(nbytes: int) -> int:
    return GGUFWriter.ggml_pad(nbytes, GGUF_DEFAULT_ALIGNMENT)


def write_file(path: Path, source: Checkpoint, packed: Loaders, entries: list[Entry]) -> None:
    """The file itself, one tensor in memory at a time."""
    writer, extra = _begin(path, source, entries)
    try:
        for array in chain(extra.values(), _arrays(source, packed, entries)):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _begin(path: Path, source: Checkpoint, entries: list[Entry]) -> tuple[GGUFWriter, dict[str, np.ndarray]]:
    """A file with all that comes before the tensors, and those tensors that the source hasn't."""
    config = load_config(source).to_dict()
    writer = GGUFWriter(path, str(family(config)["arch"]))
    _add_metadata(writer, source, entries)
    extra = {name: t.numpy() for name, t in rope_tensors(config).items()}
    for name, array in extra.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    for entry in entries:
        block, size = GGML_QUANT_SIZES[entry.kind]
        shape = (*entry.shape[:-1], entry.shape[-1] // block * size)
        writer.add_tensor_info(entry.target.name, shape, np.dtype(np.uint8), entry.nbytes, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer, extra


def _add_metadata(writer: GGUFWriter, source: Checkpoint, entries: list[Entry]) -> None:
    config = load_config(source).to_dict()
    tokens = source.shape(next(e for e in entries if e.target.name == "token_embd.weight").target.sources[0])[0]
    writer.add_type("model")
    writer.add_name(source.folder.absolute().name)
    writer.add_quantization_version(2)
    writer.add_file_type(_file_type(entries))
    add_model(writer, config)
    vocabulary(source.folder, tokens).add_to(writer)


def _file_type(entries: list[Entry]) -> int:
    """The type that holds most weights; readers show it and nothing else."""
    counts: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) > 1:
            counts[entry.kind.name] += math.prod(entry.shape)
    name = counts.most_common(1)[0][0] if counts else "F32"
    known = [t for t in LlamaFileType if t.name in (f"MOSTLY_{name}", f"MOSTLY_{name}_M", f"ALL_{name}", f"MOSTLY_{name}_MOE")]
    return int(known[-1] if known else LlamaFileType.GUESSED)


def _arrays(source: Checkpoint, packed: Loaders, entries: list[Entry]) -> Iterator[np.ndarray]:
    for entry in entries:
        parts = [tensor_bytes(source, packed, entry, name) for name in entry.target.sources]
        yield torch.stack(parts).numpy() if entry.target.stacked else parts[0].numpy()


def tensor_bytes(source: Checkpoint, packed: Loaders, entry: Entry, name: str) -> Tensor:
    """One source of a tensor as it is stored, uint8 [..., bytes of a row]."""
    if name in packed:
        weight = packed[name]()
        assert isinstance(weight, PackedBlocks)
        order = entry.target.order(len(weight.rows))
        return weight.rows if order is None else weight.rows[order]
    dtypes = {kind: dtype for dtype, kind in PLAIN.items()}
    value = entry.target.forward(source.read(name)).to(dtypes.get(entry.kind, torch.float32))
    return value.contiguous().view(torch.uint8)
