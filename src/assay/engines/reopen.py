"""Opens what was written with the engine's own reader and compares it with what was meant."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from assay.engines.contract import Contract
from assay.engines.write import Loaders, output_tensors
from assay.model.checkpoint import Checkpoint
from assay.model.errors import ShortfallError
from assay.model.level import Level


def compare(
    destination: Path, source: Checkpoint, packed: Loaders, contract: Contract, transposed: frozenset[str] = frozenset()
) -> dict[str, int]:
    """Number of tensors found equal, by kind. Raises ShortfallError naming the first that differs.

    Packed weights are decoded by the engine's own reader (the compressed-tensors library, or assay for its own
    layout) and must equal what was meant bit for bit.
    """
    written = Checkpoint.open(destination)
    counts = {"packed": 0, "copied": 0}
    expected: set[str] = set()
    for name in source.names:
        if name in packed and contract.layout != "plain":
            meant = packed[name]()
            if written.levels.get(name) != meant.level:
                raise ShortfallError(f"{destination}: config.json does not say that {name} is at level {meant.level.name}")
            own = contract.layout == "assay"
            found = written.read_packed(name).decode() if own else library_decode(written, name, meant.level)
            expected |= {name.removesuffix("weight") + suffix for suffix in meant.tensors()}
            _same(destination, name, found, meant.decode())
            counts["packed"] += 1
        else:
            for stored, tensor in output_tensors(source, name, packed, contract, transposed).items():
                expected.add(stored)
                if stored not in written.stored:
                    raise ShortfallError(f"{destination}: {stored} was not written")
                _same(destination, stored, written.read(stored), tensor)
            if contract.layout == "assay" and len(source.parts(name)) == 1:
                _same(destination, name, written.read(name), source.read(name))
            counts["copied"] += 1
    if odd := sorted(set(written.stored) ^ expected):
        raise ShortfallError(f"{destination}: {odd[0]} is in the files or in the source, but not in both")
    return counts


def library_decode(written: Checkpoint, name: str, level: Level) -> Tensor:
    """A packed weight as the compressed-tensors library decodes it."""
    module = name.removesuffix("weight")
    stored = {part.removeprefix(module): t for part, t in written.iter_raw(written.parts(name))}
    arguments = QuantizationArgs(
        num_bits=int(level.bits), type="int", symmetric=level.symmetric, group_size=level.group_size,
        strategy="channel" if level.group_size is None else "group",
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    return PackedQuantizationCompressor.decompress(stored, scheme)["weight"]


def _same(destination: Path, name: str, found: Tensor, meant: Tensor) -> None:
    equal = found.shape == meant.shape and found.dtype == meant.dtype
    if not equal or not torch.equal(_bits(found), _bits(meant)):
        raise ShortfallError(f"{destination}: {name} does not read back as it was meant")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
