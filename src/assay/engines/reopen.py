"""Opens what was written with the engine's own reader and compares it with what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from assay.engines.contract import Contract
from assay.engines.layout import LAYOUTS
from assay.engines.write import NOTHING, Loaders, output_tensors
from assay.model.checkpoint import Checkpoint
from assay.model.errors import ShortfallError


def compare(
    destination: Path, source: Checkpoint, packed: Loaders, contract: Contract, transposed: frozenset[str] = frozenset(),
    added: Mapping[str, Tensor] = NOTHING,
) -> dict[str, int]:  # fmt: skip
    """Number of tensors found equal, by kind. Raises ShortfallError naming the first that differs. added: see `write`.

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
            layout = LAYOUTS[contract.layout]
            found = library_decode(written, name) if layout.reader else written.read_packed(name).decode()
            expected |= {name.removesuffix("weight") + suffix for suffix in layout.tensors(meant)}
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
    for name, tensor in added.items():
        expected.add(name)
        _same(destination, name, dict(written.iter_raw([name]))[name], tensor)
    if odd := sorted(set(written.stored) ^ expected):
        raise ShortfallError(f"{destination}: {odd[0]} is in the files or in the source, but not in both")
    if contract.rules and (wrong := contract.rules(written)):
        raise ShortfallError(f"{destination}: {contract.since} would not read it: {wrong[0]}")
    return counts


def library_decode(written: Checkpoint, name: str) -> Tensor:
    """A compressed weight as the compressed-tensors library decodes it by what the config says of its module."""
    module = name.removesuffix("weight")
    stored = {part.removeprefix(module): t for part, t in written.iter_raw(written.parts(name))}
    groups = QuantizationConfig.model_validate(written.config["quantization_config"]).config_groups
    scheme = next(s for s in groups.values() if module.removesuffix(".") in s.targets)
    reader = BaseCompressor.get_value_from_registry(scheme.format)
    return reader.decompress(stored, scheme)["weight"].to(written.dtype(name))


def _same(destination: Path, name: str, found: Tensor, meant: Tensor) -> None:
    equal = found.shape == meant.shape and found.dtype == meant.dtype
    if not equal or not torch.equal(_bits(found), _bits(meant)):
        raise ShortfallError(f"{destination}: {name} does not read back as it was meant")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
