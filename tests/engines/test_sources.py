"""Checkpoints that others compressed: decoded exactly, usable as the source of every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from engines.samples import random_packed
from safetensors.torch import load_file, save_file
from tiny import save, text_file
from torch import Tensor

import assay
from assay.engines.layout import LAYOUTS
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError
from assay.model.layouts import floats
from assay.model.level import Level

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def model_of(folder: Path, tensors: dict[str, Tensor], **config: object) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **config}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def weights(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}


NIBBLE = {"scale_dtype": "torch.float8_e4m3fn"}
FORMATS = {
    "int-quantized": (weights("int", 8, "channel"), (32, 1), torch.float32),
    "int-quantized tensor": (weights("int", 8, "tensor"), (1,), torch.bfloat16),
    "float-quantized": (weights("float", 8, "channel"), (32, 1), torch.bfloat16),
    "float-quantized tensor": (weights("float", 8, "tensor"), (1,), torch.float32),
    "float-quantized group": (weights("float", 8, "group", group_size=64), (32, 2), torch.bfloat16),
    "float-quantized block": (weights("float", 8, "block", block_structure=[16, 64]), (2, 2), torch.bfloat16),
    "naive-quantized": (weights("int", 4, "group", group_size=32), (32, 4), torch.float16),
    "pack-quantized": (weights("int", 4, "group", group_size=32), (32, 4), torch.float16),
}  # fmt: skip
TARGETS = ["Linear", "re:.*proj$", "a.proj"]


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("target", TARGETS)
def test_what_the_library_compressed_is_decoded_as_the_library_does(tmp_path: Path, case: str, target: str) -> None:
    arguments, shape, dtype = FORMATS[case]
    form = case.split()[0]
    group = {"targets": [target], "weights": arguments, "format": form}
    if form in ("int-quantized", "float-quantized"):
        group["input_activations"] = weights(arguments["type"], 8, "token") | {"dynamic": True}
    scheme = QuantizationScheme.model_validate(group)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    scale = ((0.5 + torch.rand(shape, generator=generator)) * weight.abs().max() / 2 ** (arguments["num_bits"] - 1)).to(dtype)
    if arguments["type"] == "float":
        scale = scale / 3
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = dict(compressor.compress({"weight": weight, "weight_scale": scale}, scheme))
    meant = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": group}, "ignore": ["b.norm"]}
    tensors = {f"a.proj.{k}": v for k, v in stored.items()} | {"b.norm.weight": torch.ones(4)}
    source = model_of(tmp_path / "m", tensors, quantization_config=config)
    assert source.names == ["a.proj.weight", "b.norm.weight"]
    assert source.shape("a.proj.weight") == (32, 128)
    assert torch.equal(source.read("a.proj.weight"), meant)
    assert source.dtype("a.proj.weight") is meant.dtype
    if "block" not in case:
        assert torch.equal(source.read_packed("a.proj.weight").decode(), meant)


def test_nvfp4_with_any_unit_is_decoded_as_the_library_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    scheme = QuantizationScheme.model_validate(
        {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": weights("float", 4, "tensor_group", group_size=16)}
    )
    codes = torch.randint(0, 256, (8, 32), generator=generator, dtype=torch.uint8)
    scale = (1 + 400 * torch.rand(8, 4, generator=generator)).to(torch.float8_e4m3fn)
    unit = torch.tensor([1234.567])
    stored = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": unit}
    meant = floats.E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(1).int()].unflatten(1, (4, 16))
    meant = (meant * (scale.float() / unit)[..., None]).flatten(1).bfloat16()
    group = scheme.model_dump(mode="json")
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"g": group}}
    source = model_of(tmp_path / "m", {f"a.proj.{k}": v for k, v in stored.items()}, quantization_config=config)
    assert torch.equal(source.read("a.proj.weight"), meant)
    library = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(dict(stored), scheme)["weight"]
    assert torch.allclose(library.float(), meant.float(), rtol=2**-7)


def test_the_experts_of_gpt_oss_are_decoded_number_by_number(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 6)}
    source = model_of(tmp_path / "m", tensors, quantization_config={"quant_method": "mxfp4"})
    assert source.names == [name, f"{name}_bias"]
    assert source.shape(name) == (2, 96, 6)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    found = source.read(name)
    for e, o, i in np.ndindex(2, 6, 96):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        code = byte >> 4 if i % 2 else byte & 15
        meant = (-1 if code & 8 else 1) * values[code & 7] * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        assert found[e, i, o] == meant
    assert found.dtype is torch.bfloat16


def foreign(folder: Path, layout: str) -> Path:
    """A tiny model whose projections someone compressed to 8 (GPTQ) or 4 bits, in float16."""
    source = Checkpoint.open(save("llama", folder / "m", **WIDE))
    names = [n for n in source.names if "_proj" in n]
    level = Level(4, 32) if layout == "awq" else Level(8, 32, True)
    stored = {n: t.half() for n, t in source.iter_raw(source.names) if n not in names}
    for i, name in enumerate(names):
        packed = random_packed(level, *source.shape(name), torch.float16, i)
        packed = type(packed)(level, packed.codes, torch.full_like(packed.scale, 0.05 / 2**level.bits), packed.zero_point)
        parts = LAYOUTS[layout].tensors(packed)
        stored |= {name.removesuffix("weight") + suffix: t for suffix, t in parts.items()}
    describe = LAYOUTS[layout].config
    assert describe is not None
    config = source.config | {"quantization_config": describe(dict.fromkeys(names, level), [], frozenset()), "dtype": "float16"}
    (folder / "m" / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "m" / "model.safetensors", {"format": "pt"})
    return folder / "m"


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_a_compressed_checkpoint_is_a_source_of_the_whole_job(tmp_path: Path, layout: str) -> None:
    model, text = foreign(tmp_path, layout), text_file(tmp_path)
    options = {"calibration": text, "tokens": 512, "window": 32}
    report = assay.compress(model, tmp_path / "out", level="int3-g32-asym", engine="transformers", **options)
    assert report["ledger"]["done"] == 14
    other = tmp_path / "other.txt"
    other.write_text("the lazy dog jumps. " * 60)
    verdict = assay.verify(tmp_path / "out", model, text=other, tokens=256, window=32)
    assert verdict["kl"]["measured"] > 0
    assert {x.name for x in Checkpoint.open(tmp_path / "out").levels.values()} == {"int3-g32-asym"}
    assert assay.inspect(model)["inside"]["sites"] == 14


@pytest.mark.parametrize("scale", ["input_scale", "activation_scale"])
def test_stored_scales_of_inputs_go_with_their_weights(tmp_path: Path, scale: str) -> None:
    """Those that are compressed and one that stays."""
    model = save("llama", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    names = [n for n in tensors if "_proj" in n]
    for name in names:
        unit = tensors[name].abs().max() / 448
        tensors |= {name: (tensors[name] / unit).to(torch.float8_e4m3fn), f"{name}_scale": unit}
        tensors[name.removesuffix("weight") + scale] = torch.tensor([0.01])
    settings = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}, "dtype": "float32"}
    source = model_of(model, tensors, **json.loads((model / "config.json").read_text()) | settings)
    assert not any(n.endswith(scale) for n in source.names)
    assert source.nbytes(names[0]) == source.stored[names[0]].nbytes + 8
    options = {"calibration": text_file(tmp_path), "tokens": 512, "window": 32, "method": "nearest", "keep": ("*.0.*up_proj",)}
    assay.compress(model, tmp_path / "out", level="int4-g32-sym", engine="assay", **options)
    assert not any(n.endswith(scale) for n in Checkpoint.open(tmp_path / "out").stored)


def test_tensors_that_no_model_class_knows_survive_byte_for_byte(tmp_path: Path) -> None:
    model, text = save("llama", tmp_path / "m", **WIDE), text_file(tmp_path)
    file = model / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    extra = {
        "visual.blocks.0.attn.qkv.weight": torch.randn(12, 8, generator=generator).bfloat16(),
        "visual.patch_embed.proj.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(16, 8, generator=generator).half(),
        "model.layers.2.eh_proj.weight": torch.randn(8, 16, generator=generator),
        "audio.codes": torch.randint(-9, 9, (5,), generator=generator),
        "visual.flags": torch.tensor([True, False]),
    }
    save_file(load_file(file) | extra, file, {"format": "pt"})
    options = {"calibration": text, "tokens": 512, "window": 32}
    for engine, level in (("transformers", "int4-g32-sym"), ("gptq", "int4-g32-sym"), ("assay", "nf4-g32")):
        out = tmp_path / engine
        assay.compress(model, out, level=level, engine=engine, method="nearest", **options)
        result = Checkpoint.open(out)
        for name, tensor in extra.items():
            assert torch.equal(result.read(name), tensor) and result.read(name).dtype is tensor.dtype
        ledger = {row["tensor"]: row for row in json.loads((out / "assay" / "ledger.json").read_text())}
        assert all(ledger[n]["fate"] == "copied" and "not used by the model class" in ledger[n]["reason"] for n in extra)
    assay.convert(tmp_path / "gptq", "compressed-tensors", tmp_path / "moved")
    assert all(torch.equal(Checkpoint.open(tmp_path / "moved").read(n), t) for n, t in extra.items())
    ignored = Checkpoint.open(tmp_path / "moved").config["quantization_config"]["ignore"]
    assert {"mtp.layers.0.mlp.up_proj", "visual.blocks.0.attn.qkv"} <= set(ignored)


def test_a_part_in_another_shape_is_refused(tmp_path: Path) -> None:
    model = foreign(tmp_path, "gptq")
    stored = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    stored[name] = stored[name][:, :-1].contiguous()
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj.scales is \[4, 255\]"):
        assay.inspect(model)


def test_an_expert_that_no_token_met_falls_back_and_the_ledger_says_so(tmp_path: Path) -> None:
    model, text = save("mixtral", tmp_path / "m", num_local_experts=5), text_file(tmp_path)
    file = model / "model.safetensors"
    stored = load_file(file)
    router = next(n for n in stored if n.startswith("model.layers.1.") and n.endswith("gate.weight"))
    stored[router] = torch.tensor([[1.0], [0.5], [-1.0], [-0.5], [0.0]]) * stored[router][:1]
    save_file(stored, file, {"format": "pt"})
    options = {"calibration": text, "tokens": 512, "window": 32, "method": "gptq"}
    with pytest.raises(ShortfallError, match="fell back; see assay/ledger.json"):
        assay.compress(model, tmp_path / "out", level="int4-g32-sym", engine="gptq", **options)
    ledger = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    fallen = {row["tensor"] for row in ledger if row["fate"] == "fell_back"}
    assert fallen >= {n for n in stored if n.startswith("model.layers.1.") and ".experts.4." in n}
    assert all(".experts." in name for name in fallen) and len(fallen) < 30
    assert all(row["reason"] == "no calibration token met it" for row in ledger if row["tensor"] in fallen)
    result = Checkpoint.open(tmp_path / "out")
    for name in fallen:
        error = (result.read(name).float() - stored[name]).norm() / stored[name].norm()
        assert result.levels[name].name == "int4-g32-sym" and error < 0.15


DAMAGE = [
    ("compressed-tensors", "weight_packed", lambda t: t[:, :-1].contiguous()),
    ("compressed-tensors", "weight_shape", lambda t: t * 1000),
    ("compressed-tensors", "weight_scale", lambda t: t[:-1].contiguous()),
    ("compressed-tensors", "weight_packed", lambda t: t.float()),
    ("gptq", "qweight", lambda t: t.flatten()),
    ("gptq", "g_idx", lambda t: t * 0),
    ("gptq", "scales", lambda t: t[:0]),
    ("awq", "qzeros", lambda t: t[:, :-1].contiguous()),
    ("awq", "qweight", lambda t: t.half()),
]


@pytest.mark.parametrize(("layout", "part", "damage"), DAMAGE)
def test_damaged_parts_are_one_line_and_no_crash(tmp_path: Path, layout: str, part: str, damage: Any) -> None:
    model = foreign(tmp_path, layout)
    stored = load_file(model / "model.safetensors")
    module = "model.layers.0.mlp.up_proj."
    stored[module + part] = damage(stored[module + part])
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        Checkpoint.open(model).read(f"{module}weight")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"config_groups": {"g": {"targets": ["re:("], "weights": {"num_bits": 4}}}}, {"config_groups": [1]},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": "four", "type": "int"}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 99, "type": "int", "symmetric": True}}}},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    model = foreign(tmp_path, "compressed-tensors")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= change
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        assay.inspect(model)
    assert "\n" not in str(caught.value)
