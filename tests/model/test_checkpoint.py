"""Checkpoints are read lazily and exactly; a damaged or hostile folder is refused in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build
from safetensors.torch import load_file, save_file

from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.folder import INDEX


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama in two shards with an index."""
    _, model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-1000])


def truncate_within_header(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:40])


def empty(folder: Path) -> None:
    shards(folder)[0].write_bytes(b"")


def lose(folder: Path) -> None:
    shards(folder)[1].unlink()


def garble(folder: Path) -> None:
    shard = shards(folder)[0]
    data = bytearray(shard.read_bytes())
    data[8:40] = b"x" * 32
    shard.write_bytes(data)


def long_header(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])


def lie_about_shape(folder: Path) -> None:
    shard = shards(folder)[0]
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = next(v for k, v in header.items() if k != "__metadata__")
    entry["shape"] = [entry["shape"][0] + 1, *entry["shape"][1:]]
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def overlap(folder: Path) -> None:
    text = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    shards(folder)[0].write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))


def duplicate(folder: Path) -> None:
    first, second = shards(folder)[:2]
    tensors = load_file(first)
    name = next(iter(load_file(second)))
    save_file(tensors | {name: torch.zeros(2)}, first)


def leave_the_folder(folder: Path) -> None:
    point_index_at(folder, "../model.safetensors")


def leave_the_folder_absolutely(folder: Path) -> None:
    point_index_at(folder, "/etc/model.safetensors")


def point_index_at(folder: Path, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    (folder / INDEX).write_text(json.dumps(index))


def link_out(folder: Path) -> None:
    shard = shards(folder)[0]
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def index_names_an_absent_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.nowhere.weight"] = shards(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))


def wrong_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": ["a"]}))


def only_pickle(folder: Path) -> None:
    for shard in [*shards(folder), folder / INDEX]:
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def no_weights(folder: Path) -> None:
    for shard in [*shards(folder), folder / INDEX]:
        shard.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def garbled_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def binary_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "download the file again"),
        (truncate_within_header, "wrong safetensors header"),
        (empty, "wrong safetensors header"),
        (lose, "is missing"),
        (garble, "wrong safetensors header"),
        (long_header, "longer than the file"),
        (lie_about_shape, "shape and offsets disagree"),
        (overlap, "wrong safetensors header"),
        (duplicate, "is also in"),
        (leave_the_folder, "leaves the folder"),
        (leave_the_folder_absolutely, "leaves the folder"),
        (index_names_an_absent_tensor, "model.nowhere.weight"),
        (wrong_index, INDEX),
        (only_pickle, "pickle"),
        (no_weights, "not a model folder"),
        (no_config, "not a model folder"),
        (garbled_config, "not readable as JSON"),
        (binary_config, "not readable as JSON"),
        (list_config, "expected a JSON object"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "./absent", "absent", "a/b/c", "~/absent", ""])
def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(source: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(source)
    assert "the hub did not" not in str(caught.value)


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="give the model's folder"):
        Checkpoint.open(folder / "config.json")


def test_shards_that_are_links_as_in_the_hub_cache_are_read(folder: Path) -> None:
    stored = {name: tensor for shard in shards(folder) for name, tensor in load_file(shard).items()}
    link_out(folder)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names) == set(stored)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_read_exactly_in_their_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    _, model = build("llama")
    model = model.to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path)
    state = model.state_dict()
    assert set(checkpoint.names) == set(state)
    for name in checkpoint.names:
        assert checkpoint.dtype(name) is dtype
        assert checkpoint.shape(name) == tuple(state[name].shape)
        assert torch.equal(checkpoint.read(name), state[name])
        assert checkpoint.nbytes(name) == state[name].nbytes
    assert checkpoint.weight_bytes == sum(p.stat().st_size for p in shards(tmp_path))


def test_a_tensor_of_no_entries_is_read(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", {"w": torch.ones(2, 2), "none": torch.empty(0, 4, 2, dtype=torch.int32)})
    none = source.read("none")
    assert none.shape == (0, 4, 2) and none.dtype is torch.int32


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="no.such.weight"):
        Checkpoint.open(folder).read("no.such.weight")


def write_model(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("shape", [(128, 128), (200, 130), (5, 300), (64, 64)])
def test_fp8_with_block_scales_is_decoded_exactly(tmp_path: Path, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randn(shape, generator=generator).mul(30).to(torch.float8_e4m3fn)
    grid = (-(-shape[0] // 64), -(-shape[1] // 32))
    scale = torch.rand(grid, generator=generator) + 0.01
    quantization = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    checkpoint = write_model(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, quantization_config=quantization)
    expected = torch.empty(shape)
    for i in range(shape[0]):
        for j in range(0, shape[1], 32):
            expected[i, j : j + 32] = codes[i, j : j + 32].float() * scale[i // 64, j // 32]
    assert checkpoint.names == ["a.weight"]
    assert checkpoint.dtype("a.weight") is torch.float32
    assert torch.equal(checkpoint.read("a.weight"), expected)
    assert checkpoint.nbytes("a.weight") == codes.nbytes + scale.nbytes


@pytest.mark.parametrize("scale_shape", [(), (1,), (6, 1)])
def test_fp8_with_one_scale_per_tensor_or_row_is_decoded_exactly(tmp_path: Path, scale_shape: tuple[int, ...]) -> None:
    codes = torch.randn(6, 9).to(torch.float8_e5m2)
    scale = torch.rand(scale_shape) + 0.5
    checkpoint = write_model(tmp_path, {"a.weight": codes, "a.weight_scale": scale})
    assert torch.equal(checkpoint.read("a.weight"), codes.float() * scale)


@pytest.mark.parametrize(("exponents", "kept"), [(1, torch.bfloat16), (0.9, torch.float32)])
def test_fp8_that_stays_is_written_in_the_narrowest_dtype_that_is_exact(
    tmp_path: Path, exponents: float, kept: torch.dtype
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0).to(torch.float8_e4m3fn)
    scale = 2.0 ** (exponents * torch.tensor([[-20.0], [3.0], [0.0], [-7.0]]))
    checkpoint = write_model(tmp_path, {"a.weight": codes.view(4, 64), "a.weight_scale": scale})
    value = checkpoint.read("a.weight")
    assert checkpoint.kept_dtype("a.weight") is kept
    assert torch.equal(value.to(kept).float(), value)
    assert checkpoint.kept_nbytes("a.weight") == 256 * kept.itemsize


def test_fp8_scales_that_do_not_cover_the_weight_are_refused(tmp_path: Path) -> None:
    codes = torch.zeros(256, 256).to(torch.float8_e4m3fn)
    checkpoint = write_model(tmp_path, {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 2)})
    with pytest.raises(InputError, match=r"a\.weight"):
        checkpoint.read("a.weight")


def test_fp8_without_scales_is_read_as_it_is(tmp_path: Path) -> None:
    codes = torch.randn(4, 4).to(torch.float8_e4m3fn)
    read = write_model(tmp_path, {"a.weight": codes}).read("a.weight")
    assert torch.equal(read.float(), codes.float())


def test_side_files_are_copied_by_exclusion(folder: Path) -> None:
    wanted = ["tokenizer.json", "chat_template.jinja", "modeling_own.py", "more/vocab.txt", "preprocessor_config.json"]
    unwanted = ["pytorch_model.bin", ".cache/secret", "model.gguf", ".gitattributes", "pytorch_model.bin.index.json"]
    for name in wanted + unwanted:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    found = {str(p.relative_to(folder)) for p in Checkpoint.open(folder).side_files()}
    assert found == {*wanted, "generation_config.json"}


def test_the_fingerprint_follows_the_weights_and_the_config(folder: Path) -> None:
    first = Checkpoint.open(folder).fingerprint
    assert Checkpoint.open(folder).fingerprint == first
    shard = shards(folder)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    second = Checkpoint.open(folder).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert len({first, second, Checkpoint.open(folder).fingerprint}) == 3
