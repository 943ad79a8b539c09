"""GPTQ's, AWQ's and compressed-tensors' layouts: what we write is what others read, and is read back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import readers
from engines.samples import folder_of, random_packed, shuffled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from assay import engines
from assay.engines import reopen
from assay.engines.layout import LAYOUTS
from assay.methods import base
from assay.methods.quantize.nearest import Nearest
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
LAYOUT = ("gptq", "gptq-v2", "awq", "compressed-tensors", "compressed-tensors-w8a8")


@settings(max_examples=40)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, None]), st.booleans(), st.booleans(), DTYPES, st.integers(0, 99))
def test_gptq_is_what_its_description_says(
    bits: int, group: int | None, symmetric: bool, ordered: bool, dtype: torch.dtype, seed: int
) -> None:
    weight: Packed = random_packed(Level(bits, group, symmetric), 32, 64, dtype, seed)
    weight = shuffled(weight, seed) if ordered else weight
    later = not symmetric
    stored = LAYOUTS["gptq-v2" if later else "gptq"].tensors(weight)
    codes, zeros, groups = readers.gptq(stored, bits, not later)
    scale = stored["scales"].T[:, torch.tensor(groups).long()]
    assert torch.equal(torch.tensor(codes - zeros).to(dtype) * scale, weight.decode())


@settings(max_examples=30)
@given(st.sampled_from([32, 64, None]), DTYPES, st.integers(0, 99))
def test_awq_is_what_its_description_says(group: int | None, dtype: torch.dtype, seed: int) -> None:
    weight = random_packed(Level(4, group), 24, 64, dtype, seed)
    stored = LAYOUTS["awq"].tensors(weight)
    codes, zeros = readers.awq(stored, group or 64)
    assert torch.equal(
        torch.tensor(codes - zeros).to(dtype) * stored["scales"].T.repeat_interleave(group or 64, 1), weight.decode()
    )


def test_zero_points_of_version_1_are_stored_less_one() -> None:
    weight = random_packed(Level(4, 32, True), 32, 64, torch.float16, 0)
    assert (LAYOUTS["gptq"].tensors(weight)["qzeros"] == 0x77777777).all()
    assert (LAYOUTS["gptq-v2"].tensors(weight)["qzeros"] == -0x77777778).all()


def solved(level: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Packed:
    """Random weights rounded to a level; one group is all zeros, one row needs scales below fp16's normal numbers."""
    wanted = Level.parse(level)
    weight = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, 0, : wanted.group_size or columns] = 0
    weight[0, 1] *= 2e-5
    return Nearest().encode(weight, wanted, dtype, base.Statistics())[0]


HELD = {
    "gptq": ["int4-g32-sym", "int3-g64-sym", "int2-channel-sym", "int8-g128-sym"],
    "gptq-v2": ["int4-g32-asym", "int3-channel-asym", "int8-channel-sym"],
    "awq": ["int4-g128-asym"],
    "compressed-tensors": [
        "int4-g32-asym", "int8-channel-sym", "int3-g64-asym", "fp8-channel", "nvfp4-g16", "mxfp4-g32", "mxfp8-g32",
    ],
    "compressed-tensors-w8a8": ["int8-channel-sym", "fp8-channel"],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUT)
def test_what_we_write_is_a_source_with_the_same_levels_and_weights(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    weights = {f"model.layers.{i}.proj": solved(x, 32, 128, dtype, i) for i, x in enumerate(HELD[layout])}
    source = folder_of(tmp_path / "m", layout, weights)
    assert source.names == sorted(f"{module}.weight" for module in weights)
    assert source.levels == {f"{module}.weight": weight.level for module, weight in weights.items()}
    for module, weight in weights.items():
        name = f"{module}.weight"
        assert source.shape(name) == (32, 128)
        found = source.read(name)
        assert torch.equal(found.float(), weight.decode().float())
        assert source.dtype(name) is found.dtype
        assert torch.equal(source.read_packed(name).decode(), found)
        again = LAYOUTS[layout].tensors(source.read_packed(name))
        first = LAYOUTS[layout].tensors(weight)
        assert all(torch.equal(bits(again[k]), bits(first[k])) for k in first | again)
        size = LAYOUTS[layout].nbytes(weight.level, 32, 128, dtype.itemsize)
        assert size == source.nbytes(name) == sum(t.nbytes for t in first.values())
        if LAYOUTS[layout].reader:
            assert torch.equal(reopen.library_decode(source, name).float(), weight.decode().float())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("layout", ["gptq", "gptq-v2", "compressed-tensors"])
def test_groups_of_inputs_that_are_not_neighbours_stay_so(tmp_path: Path, layout: str) -> None:
    level = Level(4, 32, layout == "gptq")
    weight = shuffled(random_packed(level, 32, 128, torch.float16, 3), 4)
    assert isinstance(weight, PackedOrdered)
    source = folder_of(tmp_path / "m", layout, {"a.proj": weight})
    found = source.read_packed("a.proj.weight")
    assert isinstance(found, PackedOrdered)
    assert torch.equal(found.order, weight.order)
    assert torch.equal(source.read("a.proj.weight"), weight.decode())
    assert not torch.equal(source.read("a.proj.weight"), weight.base.decode())


def test_gptq_of_several_levels_says_so_in_rules(tmp_path: Path) -> None:
    weights = {
        f"model.layers.{b}.self_attn.{m}": random_packed(Level(4 if b else 8, 32, True), 32, 64, torch.float16, b)
        for b in (0, 1, 10) for m in ("q_proj", "o_proj")
    }  # fmt: skip
    source = folder_of(tmp_path / "m", "gptq", weights, ["model.layers.1.mlp.up_proj"])
    rules = source.config["quantization_config"]["dynamic"]
    assert source.config["quantization_config"]["bits"] == 4
    import re

    def matching(module: str) -> list[str]:
        return [rule[:2] for rule in rules if re.match(rule[2:], module)]

    assert matching("model.layers.0.self_attn.q_proj") == matching("model.layers.0.self_attn.qkv_proj") == ["+:"]
    assert matching("model.layers.1.self_attn.q_proj") == matching("model.layers.10.self_attn.o_proj") == []
    assert matching("model.layers.1.mlp.up_proj") == ["-:"] and not matching("model.layers.10.mlp.up_proj")


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("gptq", {"sym": True}, "symmetric"),
        ("gptq", {"bits": "4"}, "must be int"),
        ("awq", {"bits": 3}, "version gemm with 4 bits"),
        ("awq", {"version": "marlin"}, "version marlin"),
        ("compressed-tensors", {"config_groups": {}}, "no quantization scheme"),
    ],
)
def test_settings_that_contradict_the_files_are_refused(tmp_path: Path, layout: str, change: dict, words: str) -> None:
    weight = random_packed(Level(4, 32), 32, 64, torch.float16, 0)
    source = folder_of(tmp_path / "m", {"gptq": "gptq-v2"}.get(layout, layout), {"a.proj": weight})
    config = dict(source.config)
    config["quantization_config"] = config["quantization_config"] | change
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        Checkpoint.open(tmp_path / "m").read("a.proj.weight")


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_part_that_is_missing_is_named(tmp_path: Path, lost: str) -> None:
    weight = random_packed(Level(4, 32), 32, 64, torch.float16, 0)
    source = folder_of(tmp_path / "m", "awq", {"a.proj": weight})
    stored = {n: t.clone() for n, t in source.iter_raw(source.stored) if not n.endswith(lost)}
    save_file(stored, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=f"a.proj.{lost} is missing"):
        _ = Checkpoint.open(tmp_path / "m").names


def test_unequal_groups_are_refused() -> None:
    weight = random_packed(Level(4, 32), 8, 64, torch.float16, 0)
    groups = torch.zeros(64, dtype=torch.int32)
    groups[:10] = 1
    with pytest.raises(InputError, match="not all of size 32"):
        PackedOrdered.of(weight, groups)


def test_a_layout_that_is_unknown_is_named(tmp_path: Path) -> None:
    weight = random_packed(Level(4, 32), 32, 64, torch.float16, 0)
    source = folder_of(tmp_path / "m", "awq", {"a.proj": weight})
    (tmp_path / "m" / "config.json").write_text(json.dumps(source.config | {"quantization_config": {"quant_method": "aqlm"}}))
    with pytest.raises(InputError, match="'aqlm'"):
        _ = Checkpoint.open(tmp_path / "m").names


def test_the_symmetric_levels_of_awq_have_a_zero_point_in_the_middle() -> None:
    weight = random_packed(Level(4, 32, True), 32, 64, torch.float16, 0)
    plain = replace(weight, level=Level(4, 32))
    assert torch.equal(LAYOUTS["awq"].tensors(plain)["qzeros"], torch.full((2, 4), -0x77777778, dtype=torch.int32))
    assert all(not s for s in engines.get("awq").symmetric)
