"""Damaged inputs of every kind are read, or refused in one line; the same ones in every run. `benchmarks/fuzz.py` runs more."""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import pytest

from assay.model.errors import AssayError, InputError
from assay.model.layouts.base import SECONDS, matches
from fuzz import subjects
from fuzz.guard import Escaped, TooSlow, guarded
from fuzz.subjects import Subject

INPUTS = 12


@pytest.fixture(scope="module")
def prepared() -> Iterator[tuple[dict[str, Subject], dict[str, bytes]]]:
    with tempfile.TemporaryDirectory() as folder:
        found = subjects.prepare(Path(folder))
        for subject in found.values():
            subject.read()
        yield found, {kind: subject.place.read_bytes() for kind, subject in found.items()}


@pytest.mark.parametrize("kind", subjects.KINDS)
def test_nothing_but_success_or_one_line_comes_out(prepared: tuple[dict[str, Subject], dict[str, bytes]], kind: str) -> None:
    subject, valid = prepared[0][kind], prepared[1][kind]
    subject.take(valid)
    refused = 0
    for number in range(INPUTS):
        try:
            subject.take(subject.damage(number, valid))
        except AssayError as error:
            refused += 1
            assert str(error).strip() and "\n" not in str(error)
    subject.place.write_bytes(valid)
    assert refused, "no input was damaged enough to be refused"


def test_every_kind_is_run(prepared: tuple[dict[str, Subject], dict[str, bytes]]) -> None:
    assert sorted(subjects.KINDS) == sorted(prepared[0])


def header(entries: dict[str, object], body: bytes = b"") -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def pattern(text: str) -> bytes:
    group = {"targets": [f"re:{text}"], "weights": {"num_bits": 4, "type": "float"}, "format": "nvfp4-pack-quantized"}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    return json.dumps({"model_type": "llama", "quantization_config": quantization}).encode()


def gguf(tensors: int, pairs: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


LIST = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 1 << 60)
BOMB = b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 8)) for c in range(97, 110)
)
HOSTILE = {
    "a header longer than the file": ("safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
    "weights that the file doesn't hold": ("safetensors", header({"a": entry([1 << 40], 0, 1 << 42)})),
    "a product that wraps around": ("safetensors", header({"a": entry([1 << 32, 1 << 32], 0, 0)})),
    "negative sides": ("safetensors", header({"a": entry([-2, -2], 0, 16)}, bytes(16))),
    "tensors on top of each other": ("safetensors", header({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16))),
    "sizes that are no whole numbers": ("safetensors", header({"a": entry([4.5], 0, 18)}, bytes(18))),  # type: ignore[list-item]
    "a deep header": ("safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a shard above the folder": ("index", json.dumps({"weight_map": {"a": "../secret.safetensors"}}).encode()),
    "a shard from the root": ("index", json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode()),
    "a shard with a zero in its name": ("index", json.dumps({"weight_map": {"a": "a\0b"}}).encode()),
    "a pattern that is none": ("nvfp4-config", pattern("(((")),
    "code in a plan": ("plan", b"!!python/object/apply:os.system [touch was-here]\n"),
    "references that multiply": ("plan", BOMB),
    "a deep plan": ("plan", b"[" * 50_000),
    "more tensors than bytes": ("gguf", gguf(1 << 62, 0)),
    "a list longer than the file": ("gguf", gguf(0, 1, LIST)),
    "text longer than the file": ("imatrix.gguf", gguf(0, 1, struct.pack("<Q", 1 << 61))),
    "more entries than bytes": ("imatrix.dat", struct.pack("<ii", 1 << 30, 1 << 30)),
    "code that comes with a model": ("config", b'{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}'),
    "a million blocks": ("config", json.dumps({"model_type": "llama", "num_hidden_layers": 1_000_000}).encode()),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_would_take_memory_time_or_files_is_refused(
    prepared: tuple[dict[str, Subject], dict[str, bytes]], case: str
) -> None:
    kind, data = HOSTILE[case]
    subject = prepared[0][kind]
    try:
        with pytest.raises(InputError):
            subject.take(data)
    finally:
        subject.place.write_bytes(prepared[1][kind])


def test_a_pattern_that_takes_for_ever_is_given_up() -> None:
    started = perf_counter()
    with pytest.raises(InputError, match="can't be matched"):
        matches("(a|a)+$", "a" * 60 + "!")
    assert perf_counter() - started < 20 * SECONDS
    assert matches("a+$", "a" * 60)


def test_the_guard_notices_files_programs_memory_and_time(tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("")
    inside = tmp_path / "inside.txt"
    with guarded(tmp_path):
        inside.write_text("")
    with pytest.raises(Escaped, match="outside"), guarded(tmp_path):
        outside.read_text()
    with pytest.raises(Escaped, match="outside"), guarded(tmp_path):
        outside.unlink()
    with pytest.raises(Escaped, match="true"), guarded(tmp_path):
        subprocess.run(["true"], check=True)
    with guarded(tmp_path / "inner", [tmp_path]):
        inside.read_text()
    with pytest.raises(Escaped, match="inside"), guarded(tmp_path / "inner", [tmp_path]):
        inside.write_text("")
    with pytest.raises(MemoryError), guarded(tmp_path, extra=1 << 24):
        bytearray(1 << 30)
    with pytest.raises(MemoryError), guarded(tmp_path, extra=1 << 24):
        try:
            bytearray(1 << 30)
        except MemoryError as error:
            raise InputError("hidden") from error
    with pytest.raises(TooSlow), guarded(tmp_path, seconds=1):
        while True:
            pass
