"""Importance matrices of llama.cpp: mean squares of the inputs of every weight, in a GGUF file or the older .dat form."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor

from assay.model.errors import InputError
from assay.model.gguf_header import open_gguf

LEGACY = ".dat"
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Of one weight. mean: float32 [experts, in], mean squares of inputs; tokens: float32 [experts], how many were seen."""

    mean: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Imatrix:
    """Importance by name of the GGUF tensor, the text it was measured on, and its windows."""

    entries: Mapping[str, Importance]
    text: str
    windows: int
    window: int


def write(path: Path, matrix: Imatrix) -> None:
    """Write a file: the older form where the name ends in .dat."""
    partial = path.with_name(path.name + ".partial")
    if path.suffix == LEGACY:
        partial.write_bytes(b"".join(_legacy(matrix)))
    else:
        _write_gguf(partial, matrix)
    partial.replace(path)


def _write_gguf(path: Path, matrix: Imatrix) -> None:
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [matrix.text])
    writer.add_uint32("imatrix.chunk_count", matrix.windows)
    writer.add_uint32("imatrix.chunk_size", matrix.window)
    for name, entry in sorted(matrix.entries.items()):
        writer.add_tensor(name + SUMS, (entry.mean * entry.tokens[:, None]).float().numpy())
        writer.add_tensor(name + COUNTS, entry.tokens[:, None].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _legacy(matrix: Imatrix) -> Iterator[bytes]:
    """Means times a count of windows; the reader divides by that."""
    yield struct.pack("<i", len(matrix.entries))
    for name, entry in sorted(matrix.entries.items()):
        raw, values = name.encode(), (entry.mean * matrix.windows).flatten().numpy().astype("<f4")
        yield struct.pack("<i", len(raw)) + raw + struct.pack("<ii", matrix.windows, len(values)) + values.tobytes()
    text = matrix.text.encode()
    yield struct.pack("<ii", matrix.windows, len(text)) + text


def read(path: Path) -> Imatrix:
    """Read either form. Raises InputError for anything else.

    The older form doesn't say how many experts a weight has: its values come as one row.
    """
    try:
        raw = path.read_bytes()
        return _read_gguf(path) if raw[:4] == b"GGUF" else _read_legacy(raw)
    except FileNotFoundError:
        raise InputError(f"no importance matrix at {path}") from None
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, struct.error, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not an importance matrix of llama.cpp ({reason})") from error


def _read_gguf(path: Path) -> Imatrix:
    reader = open_gguf(path)
    tensors = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
    field = {key: f.contents() for key, f in reader.fields.items()}
    if field.get("general.type") != "imatrix":
        raise ValueError(f"general.type is {field.get('general.type')}")
    entries = {}
    for name in sorted(n.removesuffix(SUMS) for n in tensors if n.endswith(SUMS)):
        sums, counts = tensors[name + SUMS], tensors[name + COUNTS].flatten()
        if not len(counts) or sums.numel() % len(counts):
            raise ValueError(f"{name}: {sums.numel()} sums for {len(counts)} experts")
        sums = sums.view(len(counts), -1)
        entries[name] = Importance(sums / counts.clamp_min(1)[:, None], counts)
    texts = field.get("imatrix.datasets") or [""]
    return Imatrix(entries, str(texts[0]), int(field["imatrix.chunk_count"]), int(field["imatrix.chunk_size"]))


def _read_legacy(raw: bytes) -> Imatrix:
    at = 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, raw, at - struct.calcsize(form))

    (count,) = take("<i")
    if not 0 < count < 1 << 20:
        raise ValueError(f"{count} entries")
    entries = {}
    for _ in range(count):
        (length,) = take("<i")
        if not 0 < length < 1 << 12:
            raise ValueError(f"a name of {length} bytes")
        name = raw[at : at + length].decode()
        at += length
        calls, size = take("<ii")
        if size < 1 or at + 4 * size > len(raw):
            raise ValueError(f"{name}: {size} values where the file ends before")
        values = torch.from_numpy(np.frombuffer(raw, "<f4", size, at).copy())
        at += 4 * size
        entries[name] = Importance(values[None] / max(calls, 1), torch.tensor([float(calls)]))
    windows, text = 0, ""
    if at < len(raw):
        windows, length = take("<ii")
        text = raw[at : at + length].decode()
    return Imatrix(entries, text, windows, 0)
