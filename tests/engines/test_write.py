"""A result folder has every tensor once, as large as promised, whatever the shards; or it isn't there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from engines.samples import sample
from safetensors.torch import load_file

from assay import engines
from assay.engines import convert, load, write
from assay.model.checkpoint import Checkpoint
from assay.model.folder import INDEX, SINGLE
from assay.model.level import Level
from assay.model.packed import PackedInteger

Sample = tuple[Checkpoint, Mapping[str, Callable[[], PackedInteger]], dict[str, Level]]
PACKED, PLAIN = engines.get("transformers"), engines.get("plain")


@pytest.fixture
def made(tmp_path: Path) -> Sample:
    return sample(tmp_path / "source")


def write_to(folder: Path, made: Sample, shard_bytes: int = 10**9, engine: str = "transformers") -> Checkpoint:
    source, loaders, levels = made
    write.write(folder, source, loaders, engines.get(engine), {"assay/note.txt": "x"}, levels, shard_bytes=shard_bytes)
    return Checkpoint.open(folder)


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def header(shard: Path) -> dict:
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return {k: v for k, v in json.loads(file.read(length)).items() if k != "__metadata__"} | {"": 8 + length}


@pytest.mark.parametrize("engine", ["transformers", "plain"])
@pytest.mark.parametrize("limit", [1, 4_000, 20_000, 60_000])
def test_shards_hold_every_tensor_once_and_the_index_finds_it(tmp_path: Path, made: Sample, limit: int, engine: str) -> None:
    whole = write_to(tmp_path / "whole", made, engine=engine)
    assert not (tmp_path / "whole" / INDEX).exists()
    wanted = load_file(tmp_path / "whole" / SINGLE)
    write_to(tmp_path / "out", made, limit, engine)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert [p.name for p in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    held = [(name, shard.name) for shard in shards for name in load_file(shard)]
    assert len(held) == len(wanted)
    assert dict(held) == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    for shard in shards:
        tensors = load_file(shard)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
        logical = {name for name in whole.names if set(whole.parts(name)) & set(tensors)}
        assert all(set(whole.parts(name)) <= set(tensors) for name in logical), "a weight is torn apart"
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(logical) == 1


@pytest.mark.parametrize("engine", ["transformers", "plain"])
def test_the_bytes_are_those_that_levels_count(tmp_path: Path, made: Sample, engine: str) -> None:
    source, _, levels = made
    written = write_to(tmp_path / "out", made, 20_000, engine)
    expected = sum(source.nbytes(name) for name in source.names if engine == "plain" or name not in levels)
    if engine != "plain":
        expected += sum(level.nbytes(*source.shape(name), source.dtype(name).itemsize) for name, level in levels.items())
    data = sum(p.stat().st_size - header(p)[""] for p in (tmp_path / "out").glob("*.safetensors"))
    assert data == expected == write._expected_bytes(source, levels, engines.get(engine), frozenset())
    assert data == sum(info.nbytes for info in written.stored.values())


def test_what_is_packed_and_what_is_copied_read_back_the_same(tmp_path: Path, made: Sample) -> None:
    source, loaders, levels = made
    written = write_to(tmp_path / "out", made, 20_000)
    assert written.names == source.names
    assert written.levels == levels
    for name in source.names:
        assert torch.equal(written.read(name), loaders[name]().decode() if name in levels else source.read(name)), name
    left = {path.relative_to(source.folder) for path in source.side_files()}
    assert {Path("tokenizer.json"), Path("generation_config.json")} <= left
    assert left <= {p.relative_to(tmp_path / "out") for p in written.side_files()}
    assert (tmp_path / "out" / "assay" / "note.txt").read_text() == "x"


def test_what_a_source_says_of_its_own_layout_is_left_behind(tmp_path: Path, made: Sample) -> None:
    for name in ("hf_quant_config.json", "quantize_config.json"):
        (made[0].folder / name).write_text("{}")
    assert not any("quant" in path.name for path in write_to(tmp_path / "out", made).side_files())


def test_a_model_in_shards_runs_like_the_one_in_one_file(tmp_path: Path, made: Sample) -> None:
    ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = []
    for name, limit in (("one", 10**9), ("many", 20_000)):
        write_to(tmp_path / name, made, limit)
        with torch.no_grad():
            logits.append(load.load(tmp_path / name).eval()(ids).logits)
    assert torch.equal(*logits)


class Cut(BaseException):
    """Ctrl-C, or the disk that is suddenly full."""


def cut_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, destination: Path) -> None:
    """The `call`-th call of a function fails; at every call before it the destination must be absent."""
    real, seen = getattr(owner, name), [0]

    def cutting(*args: object, **kwargs: object) -> object:
        assert not destination.exists(), "the result is visible before it is complete"
        seen[0] += 1
        if seen[0] > call:
            raise Cut
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, cutting)


OWNERS = {"write_safetensors": write, "copyfile": shutil, "fsync": os, "rename": os}
CUTS = [
    *(
        (None, *cut)
        for cut in (
            ("write_safetensors", 0),
            ("write_safetensors", 2),
            ("copyfile", 1),
            ("fsync", 0),
            ("fsync", 5),
            ("rename", 0),
        )
    ),
    *(("plain", function, 0) for function in OWNERS),
    *(("compressed-tensors", *cut) for cut in (("copyfile", 0), ("copyfile", 3), ("fsync", 0), ("rename", 0))),
]


@pytest.mark.parametrize(("exporting", "function", "call"), CUTS)
def test_a_writer_that_is_cut_off_leaves_nothing_and_can_be_called_again(
    tmp_path: Path, made: Sample, monkeypatch: pytest.MonkeyPatch, exporting: str | None, function: str, call: int
) -> None:
    write_to(tmp_path / "first", made, 20_000)
    out = tmp_path / "out"

    def again() -> None:
        if exporting is None:
            write_to(out, made, 20_000)
        else:
            convert.convert(tmp_path / "first", exporting, out)

    before = sorted(p.name for p in tmp_path.iterdir())
    cut_at(monkeypatch, OWNERS[function], function, call, out)
    with pytest.raises(Cut):
        again()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.undo()
    again()
    if exporting != "plain":
        assert digests(out) == digests(tmp_path / "first")


def test_what_a_killed_writer_left_is_not_mixed_in(tmp_path: Path, made: Sample) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_bytes(b"half")
    write_to(tmp_path / "out", made)
    write_to(tmp_path / "other", made)
    assert digests(tmp_path / "out") == digests(tmp_path / "other")
    assert not stale.exists()
