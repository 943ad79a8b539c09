"""Results for llama.cpp: every block format reads back in llama.cpp, files are as small as asked for, sources decode."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import real_gguf as real
from engines.samples import random_packed
from gguf import GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXT, save, text_file

import assay
from assay import engines
from assay.engines.gguf import reopen, write
from assay.engines.gguf.exact import as_blocks, blocks_of
from assay.engines.gguf.write import whole_bytes
from assay.methods import base
from assay.model.blocks import PackedBlocks
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.ggml import FP4
from assay.model.level import Level
from assay.model.packed import PackedTable

CONTRACT = engines.get("llama.cpp")
NOISE = 1e-2
"""Nats per token, on random models of 2 blocks: llama.cpp rounds activations to 8 bits."""


def rounded(source: Checkpoint, name: str, kind: str) -> PackedBlocks:
    return base.get("nearest")().encode(source.read(name).float()[None], Level.parse(kind), torch.float32, base.Statistics())[0]


def blocks_model(family: str, folder: Path, kinds: list[str], **changes: object) -> tuple[Checkpoint, dict, dict[str, Level]]:
    """A tiny model in which the matrices of the blocks are at the kinds in turn."""
    real.lively(family, folder, hidden_size=256, intermediate_size=256, **changes)
    source = Checkpoint.open(folder)
    names = [n for n in source.names if "proj" in n or ".experts." in n]
    made = {n: rounded(source, n, kinds[0] if ".experts." in n else kinds[i % len(kinds)]) for i, n in enumerate(names)}
    return source, {n: partial(made.__getitem__, n) for n in made}, {n: p.level for n, p in made.items()}


@pytest.mark.parametrize("kind", list(CONTRACT.formats))
def test_llama_cpp_reads_every_block_format_as_we_decode_it(tmp_path: Path, kind: str) -> None:
    source, loaders, levels = blocks_model("llama", tmp_path / "m", [kind], head_dim=64)
    write.write(tmp_path / "out", source, loaders, CONTRACT, {}, levels)
    counts = reopen.compare(tmp_path / "out", source, loaders, CONTRACT)
    assert counts["packed"] == len(loaders)
    ids = list(range(3, 43))
    with torch.no_grad():
        wanted = assay.load(tmp_path / "out").float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = real.llama_logits(tmp_path / "out" / "model.gguf", ids).log_softmax(-1)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() <= NOISE


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_stacked_in_blocks(tmp_path: Path, family: str) -> None:
    source, loaders, levels = blocks_model(family, tmp_path / "m", ["q5_k", "q8_0"], moe_intermediate_size=256, head_dim=64)
    write.write(tmp_path / "out", source, loaders, CONTRACT, {}, levels)
    reopen.compare(tmp_path / "out", source, loaders, CONTRACT)
    ids = list(range(3, 43))
    with torch.no_grad():
        wanted = assay.load(tmp_path / "out").float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = real.llama_logits(tmp_path / "out" / "model.gguf", ids).log_softmax(-1)
    # a token whose expert changes with the noise of activations is far off
    assert (wanted.exp() * (wanted - found)).sum(-1).median() <= NOISE


def test_experts_of_one_tensor_at_two_levels_are_refused(tmp_path: Path) -> None:
    source, loaders, levels = blocks_model("mixtral", tmp_path / "m", ["q5_k"])
    name = next(n for n in levels if ".experts.1.w1" in n)
    with pytest.raises(InputError, match="are one tensor of a GGUF file: give them one level"):
        write.write(tmp_path / "out", source, loaders, CONTRACT, {}, levels | {name: Level.parse("q4_k")})
    assert not (tmp_path / "out").exists()


# ---- the whole way ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text and a profile."""
    room = tmp_path_factory.mktemp("room")
    real.lively("qwen3", room / "m", hidden_size=96, intermediate_size=160, head_dim=24)
    assay.profile(room / "m", room / "p", calibration=text_file(room), tokens=2048, window=32, methods=("ggml",))
    return room


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_file_is_as_small_as_asked_for_and_its_ledger_counts_it(room: Path, tmp_path: Path, share: float) -> None:
    limit = int(share * whole_bytes(Checkpoint.open(room / "m"))[0])
    report = assay.compress(room / "m", tmp_path / "out", profile=room / "p", size=limit, engine="gguf")
    assert 0.9 * limit <= (tmp_path / "out" / "model.gguf").stat().st_size == report["bytes"] <= limit
    ledger = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    assert sum(e["bytes_after"] for e in ledger) == sum(
        int(t.n_bytes) for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors
    )
    plan = assay.plan(room / "p", size=limit, engine="llama.cpp")
    assert plan.nbytes_tensors <= limit
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    verdict = assay.verify(tmp_path / "out", room / "m", text=tmp_path / "other.txt", tokens=512, window=16)
    assert verdict["bytes"] == report["bytes"]


def test_the_size_of_a_file_is_known_before_it_is_written(room: Path, tmp_path: Path) -> None:
    assay.export(room / "m", "gguf", tmp_path / "out")
    found = (tmp_path / "out" / "model.gguf").stat().st_size
    tensors = sum(int(t.n_bytes) for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors)
    assert whole_bytes(Checkpoint.open(room / "m")) == (found, tensors)


def test_rows_that_are_no_whole_blocks_get_another_level_and_the_ledger_says_so(room: Path, tmp_path: Path) -> None:
    assay.compress(room / "m", tmp_path / "out", profile=room / "p", level="q4_k", engine="llama.cpp")
    ledger = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    done = [e for e in ledger if e["fate"] == "done"]
    assert len(done) == 14
    assert {e["planned"] for e in done} == {"q5_0"}
    assert all("q4_k has blocks of 256 weights, which do not divide" in e["reason"] for e in done)


def test_a_model_without_a_layout_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    save("gpt_neox", tmp_path / "m")
    with pytest.raises(InputError, match="gpt_neox"):
        assay.compress(tmp_path / "m", tmp_path / "out", bits=4.6, engine="llama.cpp", calibration=text_file(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "text.txt"]


# ---- from other layouts ----------------------------------------------------------------------


@settings(max_examples=40)
@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), group=st.sampled_from([32, 64, None]), seed=st.integers(0, 99))
def test_symmetric_integers_keep_codes_and_scales(bits: int, group: int | None, seed: int) -> None:
    packed = random_packed(Level(bits, group, True), 5, 128, torch.float16, seed)
    blocks = blocks_of(packed)
    assert isinstance(blocks, PackedBlocks)
    exact = packed._offsets().float() * packed.scale.float()[..., None]
    assert torch.equal(blocks.decode(), exact.flatten(1))


def test_mxfp4_keeps_its_values() -> None:
    codes = torch.arange(15, dtype=torch.uint8).repeat(5, 13)[:, :192]
    table = torch.tensor([*sorted({v / 2 for v in FP4}), 6.0])
    scale = torch.randint(110, 140, (5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = PackedTable(Level.parse("mxfp4-g32"), codes, table, torch.float32, scale)
    blocks = blocks_of(packed)
    assert isinstance(blocks, PackedBlocks)
    assert torch.equal(blocks.decode(), packed.decode())


def test_what_no_block_holds_is_refused_with_the_weights_and_the_nearest_type() -> None:
    fine = random_packed(Level(4, 32, True), 4, 64, torch.float16, 0)
    zeros = random_packed(Level(4, 32, False), 4, 64, torch.float16, 0)
    odd = random_packed(Level(4, 16, True), 4, 64, torch.float16, 0)
    wanted = (
        "1 of 3 weights at int4-g16-sym: groups are no multiples of 32.*1 of 3 weights at int4-g32-asym: .*q4_k.*--engine llama"
    )
    with pytest.raises(InputError, match=wanted):
        as_blocks({"a": lambda: fine, "b": lambda: zeros, "c": lambda: odd})
    wide = random_packed(Level(4, 32, True), 4, 64, torch.float32, 0)
    assert blocks_of(wide) == "a scale is no fp16 number"


def test_a_plain_result_and_a_packed_one_export_to_what_llama_cpp_reads(tmp_path: Path) -> None:
    real.lively("llama", tmp_path / "m").model.half().save_pretrained(tmp_path / "m")
    given = {"calibration": text_file(tmp_path), "tokens": 1024, "window": 32}
    assay.compress(tmp_path / "m", tmp_path / "s", level="int4-g32-sym", method="nearest", **given)
    assay.export(tmp_path / "s", "gguf", tmp_path / "g")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "g" / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    packed, opened = Checkpoint.open(tmp_path / "s"), Checkpoint.open(tmp_path / "g")
    for name in packed.levels:
        torch.testing.assert_close(opened.read(name).half(), packed.read(name), rtol=0, atol=0)
    ids = list(range(3, 43))
    with torch.no_grad():
        wanted = assay.load(tmp_path / "g").float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = real.llama_logits(tmp_path / "g" / "model.gguf", ids).log_softmax(-1)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() <= NOISE


# ---- GGUF as a source ------------------------------------------------------------------------


@pytest.mark.parametrize("family", real.FAMILIES)
def test_a_file_alone_is_a_model_with_the_same_values(tmp_path: Path, family: str) -> None:
    made = real.lively(family, tmp_path / "m")
    source = Checkpoint.open(tmp_path / "m")
    write.write(tmp_path / "out", source, {}, CONTRACT, {}, {})
    (tmp_path / "out" / "model.gguf").rename(tmp_path / "alone.gguf")
    alone = Checkpoint.open(tmp_path / "alone.gguf")
    assert alone.names == source.names
    for name in source.names:
        assert alone.dtype(name) == alone.read(name).dtype
        assert tuple(alone.read(name).shape) == alone.shape(name)
        torch.testing.assert_close(alone.read(name), source.read(name), rtol=0, atol=1e-7)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = made.model(ids).logits
        found = assay.load(tmp_path / "alone.gguf").float()(ids).logits
    assert (found - wanted).abs().max() <= 1e-4


def test_a_gguf_folder_can_be_compressed_again_for_another_engine(tmp_path: Path) -> None:
    source, loaders, levels = blocks_model("llama", tmp_path / "m", ["q4_0"], head_dim=64)
    write.write(tmp_path / "g", source, loaders, CONTRACT, {}, levels)
    given = {"calibration": text_file(tmp_path), "tokens": 1024, "window": 32, "method": "nearest", "level": "int8-g32-sym"}
    assay.compress(tmp_path / "g", tmp_path / "out", engine="transformers", **given)
    again = Checkpoint.open(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    assert again.levels[name].bits == 8
    meant = loaders[name]().decode()
    assert (again.read(name) - meant).norm() < 0.01 * meant.norm()
    (tmp_path / "alone").mkdir()
    (tmp_path / "g" / "model.gguf").rename(tmp_path / "alone" / "model.gguf")
    with pytest.raises(InputError, match="put tokenizer.json and config.json of the original model beside it"):
        assay.compress(tmp_path / "alone" / "model.gguf", tmp_path / "no", **given)


def test_blocks_of_a_file_decode_as_the_gguf_package_decodes_them(tmp_path: Path) -> None:
    source, loaders, levels = blocks_model("llama", tmp_path / "m", ["q6_k", "iq4_xs", "q3_k"], head_dim=64)
    write.write(tmp_path / "out", source, loaders, CONTRACT, {}, levels)
    opened = Checkpoint.open(tmp_path / "out")
    tensor = next(t for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(opened.read(name), torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type)))
    for name, load in loaders.items():
        assert torch.equal(opened.read(name), load().decode()), name


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    real.lively("llama", tmp_path / "m")
    write.write(tmp_path / "out", Checkpoint.open(tmp_path / "m"), {}, CONTRACT, {}, {})
    data = (tmp_path / "out" / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    (tmp_path / "odd.gguf").write_bytes(b"GGXX" + data[4:])
    (tmp_path / "other.gguf").write_bytes(data.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                                       b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0rwkv6"))  # fmt: skip
    for name in ("cut", "odd"):
        with pytest.raises(InputError, match="not a GGUF file, or a damaged one"):
            Checkpoint.open(tmp_path / f"{name}.gguf")
    with pytest.raises(InputError, match="a GGUF file of architecture rwkv6, whose layout is not known"):
        Checkpoint.open(tmp_path / "other.gguf")
    for name in ("a", "b"):
        (tmp_path / "out" / f"{name}.gguf").write_bytes(data)
    with pytest.raises(InputError, match="holds 3 GGUF files; name the one"):
        Checkpoint.open(tmp_path / "out")
