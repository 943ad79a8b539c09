"""Headers of safetensors files: where every tensor lies and what it is, checked against the file's size."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.model.stored import TensorInfo

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000


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
        infos = {name: _info(shard, entry, 8 + length) for name, entry in header.items()}
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


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor of a safetensors file. Raises OSError, also for a file that ends too early.

    It is read, not mapped: a mapped file that another program cuts short kills the process.
    """
    if not info.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    raw = np.fromfile(info.shard, np.uint8, info.nbytes, offset=info.start)
    if len(raw) != info.nbytes:
        raise OSError("the file ends too early")
    return torch.from_numpy(raw).view(info.dtype).view(info.shape)


def _info(shard: Path, entry: dict[str, Any], body: int) -> TensorInfo:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int for n in (*shape, start, end)):
        raise ValueError("sizes must be whole numbers")
    count = 1
    for n in shape:
        count *= n
    if min(shape, default=0) < 0 or end - start != count * dtype.itemsize:
        raise ValueError("shape and offsets disagree")
    return TensorInfo(shard, dtype, shape, end - start, body + start)
