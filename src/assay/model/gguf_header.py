"""Walks the header of a GGUF file before the library reads it, which believes every count and length that it meets."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from gguf import GGUFReader

MAGIC, HEAD = b"GGUF", 24
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
ELEMENTS = 1 << 23
"""Of all lists together: tens of times what the largest vocabulary takes."""
DIMENSIONS = 8
WEIGHTS_A_BYTE = 8


def open_gguf(path: Path) -> GGUFReader:
    """The library's reader of a file whose counts and lengths stay inside it. Raises ValueError, and what the library does."""
    check(path)
    return GGUFReader(path)


def check(path: Path) -> None:
    """Raises ValueError for a header with counts, lengths or nesting that no file of this size can have."""
    if path.stat().st_size < HEAD:
        raise ValueError("shorter than a header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).run()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.elements = data, 0, 0

    def run(self) -> None:
        magic, version = self.data[:4], self.take("<4xI")
        if magic != MAGIC or version & 0xFFFF == 0:
            raise ValueError("no magic number, or of big-endian byte order")
        tensors, pairs = self.take("<Q"), self.take("<Q")
        for _ in range(self.few(pairs, 13)):
            self.text()
            self.value(self.take("<I"))
        for _ in range(self.few(tensors, 32)):
            self.text()
            self.tensor()

    def take(self, form: str) -> int:
        size = struct.calcsize(form)
        if self.at + size > len(self.data):
            raise ValueError("it ends inside its header")
        self.at += size
        return int(struct.unpack_from(form, self.data, self.at - size)[0])

    def few(self, count: int, nbytes: int) -> int:
        """A count of things that take at least so many bytes each."""
        if count * nbytes > len(self.data) - self.at:
            raise ValueError(f"{count} entries where {len(self.data) - self.at} bytes are left")
        return count

    def text(self) -> None:
        size = self.take("<Q")
        self.at += self.few(size, 1)

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            self.array()
        elif kind in SIZES:
            self.at += self.few(SIZES[kind], 1)
        else:
            raise ValueError(f"a value of unknown type {kind}")

    def array(self) -> None:
        kind, count = self.take("<I"), self.take("<Q")
        if kind not in SIZES and kind != STRING:
            raise ValueError(f"a list of values of type {kind}")
        self.elements += self.few(count, SIZES.get(kind, 8))
        if self.elements > ELEMENTS:
            raise ValueError(f"lists of more than {ELEMENTS} values")
        if kind in SIZES:
            self.at += count * SIZES[kind]
            return
        for _ in range(count):
            self.text()

    def tensor(self) -> None:
        dimensions, count = self.take("<I"), 1
        if dimensions > DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        for _ in range(dimensions):
            count *= self.take("<Q")
        if count > WEIGHTS_A_BYTE * len(self.data) or self.take("<I") < 0 or self.take("<Q") > len(self.data):
            raise ValueError(f"a tensor of {count} weights in a file of {len(self.data)} bytes")
