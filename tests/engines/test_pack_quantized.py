"""`pack-quantized` as we write it and as the compressed-tensors library does: either reads what the other wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from engines.samples import random_packed, scheme
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from tiny import save, text_file
from torch import Tensor

import assay
from assay import engines
from assay.model.checkpoint import Checkpoint
from assay.model.layouts.compressed_tensors import config as quantization_config
from assay.model.level import Level
from assay.model.packed import PackedInteger
from assay.model.stored import TensorInfo

GROUPS = st.sampled_from([None, 1, 3, 16, 32, 64, 128])
LEVELS = st.builds(Level, st.integers(2, 8), GROUPS, st.booleans())
SHAPES = st.tuples(st.integers(1, 41), st.integers(1, 5), st.integers(1, 70))
LEAST = engines.get("transformers").least_outputs - 1
SCALES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def columns(level: Level, shape: tuple[int, int, int]) -> int:
    """Odd widths where one group spans the row, whole groups otherwise."""
    return shape[2] if level.group_size is None else shape[1] * level.group_size


@given(LEVELS, SHAPES, SCALES, st.integers(0, 999))
def test_the_library_decodes_what_we_packed(level: Level, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    packed = random_packed(level, LEAST + shape[0], columns(level, shape), dtype, seed)
    stored = load_bytes(save_bytes(packed.tensors()))
    decoded = PackedQuantizationCompressor.decompress(stored, scheme(level))["weight"]
    assert decoded.dtype is dtype
    assert torch.equal(decoded, packed.decode())


@given(LEVELS, SHAPES, st.integers(0, 999))
def test_the_library_packs_the_same_codes_into_the_same_bytes(level: Level, shape: tuple[int, int, int], seed: int) -> None:
    packed = random_packed(level, shape[0], columns(level, shape), torch.float32, seed)
    ours, theirs = packed.tensors(), library_pack(packed.decode(), packed)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype is theirs[name].dtype


@given(LEVELS, SHAPES, st.integers(0, 999))
def test_we_decode_what_the_library_packed(level: Level, shape: tuple[int, int, int], seed: int) -> None:
    grid = random_packed(level, LEAST + shape[0], columns(level, shape), torch.float32, seed)
    weight = torch.randn(grid.codes.shape, generator=torch.Generator().manual_seed(seed)) * grid.scale.mean()
    theirs = library_pack(weight, grid)
    decoded = PackedQuantizationCompressor.decompress(dict(theirs), scheme(level))["weight"]
    assert torch.equal(PackedInteger.from_tensors(theirs, level).decode(), decoded)


def library_pack(weight: Tensor, grid: PackedInteger) -> dict[str, Tensor]:
    """A weight rounded and packed by the library on the grid's scales and zero points, which it counts from the middle."""
    zero = grid.zero_point.to(torch.int16) - (1 << (int(grid.level.bits) - 1))
    state = {"weight": weight, "weight_scale": grid.scale, "weight_zero_point": zero.to(torch.int8)}
    return dict(PackedQuantizationCompressor.compress(state, scheme(grid.level)))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_matrices_that_the_library_can_not_read_stay(tmp_path: Path, engine: str) -> None:
    model, text = save("llama", tmp_path / "m", head_dim=8, num_key_value_heads=1), text_file(tmp_path)
    options = {"level": "int4-g32-asym", "engine": engine, "calibration": text, "tokens": 1024, "window": 32}
    assay.compress(model, tmp_path / "out", **options)
    written = Checkpoint.open(tmp_path / "out")
    assert {n for n in written.names if "k_proj" in n or "v_proj" in n}.isdisjoint(written.levels)
    assert {n for n in written.names if "o_proj" in n} <= written.levels.keys()
    ledger = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    assert all("fewer than 9 outputs" in row["reason"] for row in ledger if "k_proj" in row["tensor"])


MODULES = [f"model.layers.{b}.{m}" for b in (0, 1, 10, 11) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.up_proj_2")]


@given(st.dictionaries(st.sampled_from(MODULES), LEVELS), st.sets(st.sampled_from(MODULES)))
def test_every_module_has_its_own_level_in_the_library_and_when_read_back(levels: dict[str, Level], kept: set[str]) -> None:
    named = {f"{module}.weight": level for module, level in levels.items()}
    config = quantization_config(named, sorted(kept - levels.keys()))
    parsed = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1)
    for module in MODULES:
        found = [g for g in parsed.config_groups.values() if is_match(module, linear, g.targets, parsed.ignore)]
        assert [g.format for g in found] == ["pack-quantized"] * (module in levels)
        for group in found:
            meant = scheme(levels[module]).weights
            assert meant is not None and group.weights is not None
            for fact in ("num_bits", "type", "symmetric", "group_size", "strategy"):
                assert getattr(group.weights, fact) == getattr(meant, fact)
    info = TensorInfo(Path(), torch.bfloat16, (64, 2), 256)
    parts = ("weight_packed", "weight_scale", "weight_shape")
    stored = {f"{module}.{part}": info for module in levels for part in parts}
    assert Checkpoint(Path(), {"quantization_config": config}, stored).levels == named


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize("bits", [5.5, 7.0, 12.0, 20.0])
def test_what_vllm_fuses_is_one_group_or_stays(tmp_path: Path, bits: float) -> None:
    model, text = save("qwen3", tmp_path / "m", intermediate_size=128), text_file(tmp_path)
    assay.compress(model, tmp_path / "out", bits=bits, engine="vllm", calibration=text, tokens=1024, window=32)
    written = Checkpoint.open(tmp_path / "out")
    assert len({written.levels.get(name) for name in written.names if "proj" in name}) > 1
    parsed = QuantizationConfig.model_validate(written.config["quantization_config"])
    linear, contract = torch.nn.Linear(1, 1), engines.get("vllm")
    for fused, shards in FUSED.items():
        for block in range(2):
            parent = f"model.layers.{block}." + ("self_attn." if fused == "qkv_proj" else "mlp.")
            own = {written.levels.get(f"{parent}{shard}.weight") for shard in shards}
            assert len(own) == 1, f"{parent}{fused}: {own}"
            found = [g for g in parsed.config_groups.values() if is_match(parent + fused, linear, g.targets, fused=FUSED)]
            ignored = is_match(parent + fused, linear, parsed.ignore, fused=FUSED)
            assert (len(found), ignored) == ((0, True) if own == {None} else (1, False))
    assert all(contract.takes(level, written.shape(name)[1]) for name, level in written.levels.items())
