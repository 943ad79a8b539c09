"""FP8 in blocks, stored scales of inputs and of the cache: what is written, and what stock transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save, text_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import assay
from assay import engines
from assay.calibrated import calibrated
from assay.engines.vllm_rules import problems
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 64}
TEXT = {"tokens": 512, "window": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, its profile `p`, and results of it by engine."""
    folder = tmp_path_factory.mktemp("calibrated")
    save("llama", folder / "m", **WIDE)
    wanted = [Level.parse(x).name for x in ("tile8-g128", "fp8-channel", "int8-channel-sym", "int4-g128-sym")]
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), methods=("two_sided",), levels=wanted, **TEXT)
    for engine, level, options in (
        ("vllm-w8a8", "FP8_BLOCK", {}), ("transformers", "FP8_BLOCK", {}), ("vllm-w8a8-static", "FP8", {}),
        ("vllm", "W4A16", {"context": 32, "cache": "fp8"}),
    ):  # fmt: skip
        assay.compress(folder / "m", folder / engine, engine=engine, level=level, profile=folder / "p", **options)
    return folder


def met(folder: Path) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """The largest input of every linear layer, and of each layer's keys and values, from the whole model at once."""
    profile, streamed = Profile.open(folder / "p"), StreamedModel(Checkpoint.open(folder / "m"))
    text = assay.measure.text.recall(streamed.checkpoint, profile.index["calibration"], streamed.vocabulary, "a test")
    model, largest = AutoModelForCausalLM.from_pretrained(folder / "m"), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, x, y, name=name: largest.update({name: float(x[0].abs().max())}))
    with torch.no_grad():
        cache = model(text.ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return largest, [(float(layer.keys.abs().max()), float(layer.values.abs().max())) for layer in cache.layers]


def stock(folder: Path) -> nn.Module:
    """The model after a first call, at which compressed-tensors decodes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long))
    return model


@pytest.mark.parametrize("engine", ["vllm-w8a8", "transformers", "vllm-w8a8-static", "vllm"])
def test_stock_transformers_decodes_the_weights_that_we_meant(made: Path, engine: str) -> None:
    source, model = Checkpoint.open(made / engine), stock(made / engine)
    assert problems(source) == [] and len(source.levels) == 14
    for name in source.levels:
        assert torch.equal(model.get_parameter(name).data, source.read(name)), name


def test_a_block_of_128_by_128_weights_shares_one_scale(made: Path) -> None:
    source = Checkpoint.open(made / "vllm-w8a8")
    stored = dict(source.iter_raw([n for n in source.stored if "down_proj" in n]))
    weight, scale = stored["model.layers.0.mlp.down_proj.weight"], stored["model.layers.0.mlp.down_proj.weight_scale"]
    assert weight.dtype == torch.float8_e4m3fn and scale.shape == (2, 2)
    original = Checkpoint.open(made / "m").read("model.layers.0.mlp.down_proj.weight")
    tiles = original.unflatten(0, (2, 128)).unflatten(2, (2, 128)).abs().amax((1, 3))
    assert bool((tiles / scale <= 449).all()), "the largest weight of a block is within the range of FP8"
    group = next(iter(source.config["quantization_config"]["config_groups"].values()))
    assert (group["weights"]["strategy"], group["weights"]["block_structure"]) == ("block", [128, 128])
    inputs = group["input_activations"]
    assert (inputs["strategy"], inputs["group_size"], inputs["dynamic"]) == ("group", 128, True)


@pytest.mark.parametrize("engine", ["vllm-w8a8", "vllm-w8a8-static"])
def test_rounding_inputs_changes_little_in_stock_transformers(made: Path, engine: str) -> None:
    ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, meant = stock(made / engine)(ids).logits, assay.load(made / engine, kernels=False)(ids).logits
    assert 0 < (found - meant).norm() / meant.norm() < 0.1


def test_scales_of_inputs_are_those_of_the_calibration_text(made: Path) -> None:
    source, largest = Checkpoint.open(made / "vllm-w8a8-static"), met(made)[0]
    scales = dict(source.iter_raw([n for n in source.stored if n.endswith("input_scale")]))
    assert len(scales) == 14 and all(t.shape == (1,) and t.dtype == torch.float32 for t in scales.values())
    for name, scale in scales.items():
        assert float(scale) * 448 == pytest.approx(largest[name.removesuffix(".input_scale")], rel=1e-4), name
    model = stock(made / "vllm-w8a8-static")
    assert all(model.get_parameter(n).item() == t.item() for n, t in scales.items())


def test_scales_of_the_cache_are_those_of_keys_and_values_as_they_are_cached(made: Path) -> None:
    source, largest = Checkpoint.open(made / "vllm"), met(made)[1]
    assert source.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    model = stock(made / "vllm")
    for layer, (keys, values) in enumerate(largest):
        for name, top in (("k_scale", keys), ("v_scale", values)):
            path = f"model.layers.{layer}.self_attn.{name}"
            assert float(dict(source.iter_raw([path]))[path]) * 448 == pytest.approx(top, rel=1e-4)
            assert model.get_parameter(path).item() * 448 == pytest.approx(top, rel=1e-4)


def test_the_ledger_counts_the_scales_and_other_caches_have_none(made: Path, tmp_path: Path) -> None:
    entries = {e["tensor"]: e for e in json.loads((made / "vllm" / "assay" / "ledger.json").read_text())}
    assert entries["model.layers.1.self_attn.v_scale"]["bytes_after"] == 4
    assay.compress(made / "m", tmp_path / "o", engine="vllm", level="W4A16", profile=made / "p", context=32, cache="fp16")
    source = Checkpoint.open(tmp_path / "o")
    assert source.config["quantization_config"]["kv_cache_scheme"] is None
    assert not any(name.endswith("_scale") and "self_attn.k_scale" in name for name in source.stored)


def test_another_layout_of_a_static_result_leaves_the_scales_of_inputs_behind(made: Path, tmp_path: Path) -> None:
    assay.export(made / "vllm-w8a8-static", "plain", tmp_path / "o")
    assert not any("input_scale" in name for name in Checkpoint.open(tmp_path / "o").stored)


def test_a_profile_without_maxima_is_refused_before_any_work(made: Path, tmp_path: Path) -> None:
    profile, streamed = Profile.open(made / "p"), StreamedModel(Checkpoint.open(made / "m"))
    for path in made.joinpath("p").glob("block-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("block-*.H.safetensors"):
        strip(path)
    old = Profile(tmp_path, profile.index)
    levels = {"model.layers.0.mlp.up_proj.weight": Level.parse("fp8-channel")}
    with pytest.raises(InputError, match="run assay profile again"):
        calibrated(streamed, old, engines.get("vllm-w8a8-static"), levels, None)
    with pytest.raises(InputError, match="run assay profile again"):
        calibrated(streamed, old, engines.get("vllm"), levels, "fp8")
    assert calibrated(streamed, old, engines.get("vllm"), levels, None) == {}


def strip(path: Path) -> None:
    """Take the maxima out of a profile's file."""
    from assay.model.files import load_tensors, save_tensors

    save_tensors(path, {n: t for n, t in load_tensors(path).items() if not n.startswith("largest|")})


def change(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        edit(next(iter(config["quantization_config"]["config_groups"].values())))
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def replace(name: str, new: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        value = new(tensors.pop(name))
        save_file(tensors | ({name: value} if value is not None else {}), folder / "model.safetensors")

    return apply


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("engine", "edit", "words"),
    [
        ("vllm-w8a8", change(lambda g: g["input_activations"].update(group_size=64)), "in groups as wide as a block"),
        ("vllm-w8a8", change(lambda g: g["input_activations"].update(dynamic=False)), "in groups as wide as a block"),
        ("vllm-w8a8", replace(f"{UP}.weight_scale", lambda t: t[:1].clone()), "the kernel loads"),
        ("vllm-w8a8", change(lambda g: g["weights"].update(block_structure=[96, 128])), "don't divide"),
        ("vllm-w8a8-static", replace(f"{UP}.input_scale", lambda t: None), "input_scale is missing"),
        ("vllm-w8a8-static", replace(f"{UP}.input_scale", lambda t: t.repeat(2)), "the kernel loads"),
        ("vllm-w8a8-static", change(lambda g: g["input_activations"].update(strategy="token")), "one a layer and symmetric"),
        ("vllm", replace("model.layers.1.self_attn.v_scale", lambda t: None), "v_scale is missing"),
    ],
)
def test_the_rules_name_what_is_wrong(made: Path, tmp_path: Path, engine: str, edit: Callable[[Path], None], words: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((made / engine / name).read_bytes())
    edit(tmp_path)
    found = problems(Checkpoint.open(tmp_path))
    assert any(words in line for line in found), found


def test_what_blocks_do_not_divide_stays(tmp_path: Path) -> None:
    for name in ("vllm-w8a8", "transformers"):
        contract, level = engines.get(name), Level.parse("tile8-g128")
        assert contract.takes(level, 256, rows=128) and not contract.takes(level, 256, rows=64)
        assert not contract.takes(level, 192, rows=128)
    assert engines.get("vllm-w8a8-static").refuses("mlp.gate", (256, 256), False, 0, "a.experts.0.gate_proj.weight")
