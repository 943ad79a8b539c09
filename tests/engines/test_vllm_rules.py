"""The rules of vLLM's loader pass what we write and name what a wrong file has."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import is_match
from families import WRITTEN
from safetensors.torch import load_file, save_file
from tiny import save

from assay import engines
from assay.engines import reopen, write
from assay.engines.fused import share_units
from assay.engines.vllm_rules import problems
from assay.methods import base
from assay.methods.quantize.nearest import Nearest
from assay.model.checkpoint import Checkpoint
from assay.model.errors import ShortfallError
from assay.model.level import Level
from assay.model.packed import Packed

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
LEVELS = [("vllm", x) for x in ("int4-g32-asym", "int4-g128-sym", "int8-channel-sym", "fp8-channel", "nvfp4-g16")]
LEVELS += [("vllm-w8a8", x) for x in ("int8-channel-sym", "fp8-channel")]


def written(folder: Path, engine: str, level: str, keep: str = "o_proj", family: str = "llama") -> tuple[Any, ...]:
    """A model at a level whose `keep` modules stay; the source and the loaders."""
    more = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    source = Checkpoint.open(save(family, folder / "m", **WIDE, **more))
    plain = family != "llama" and engine == "vllm" and level in ("int4-g32-asym", "fp8-channel")
    keep = ".experts." if plain else keep
    names = [n for n in source.names if n.endswith("_proj.weight") and keep not in n]
    wanted = dict.fromkeys(names, Level.parse(level))

    def encode(name: str) -> Packed:
        weight = source.read(name).float()[None]
        return Nearest().encode(weight, wanted[name], source.dtype(name), base.Statistics())[0]

    loaders = share_units({n: cache(partial(encode, n)) for n in names}, wanted)
    write.write(folder / "out", source, loaders, engines.get(engine), {}, wanted)
    return source, loaders


@pytest.mark.parametrize(("engine", "level"), LEVELS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_we_write_is_what_the_loader_asks_for(tmp_path: Path, engine: str, level: str, family: str) -> None:
    source, loaders = written(tmp_path, engine, level, family=family)
    assert problems(Checkpoint.open(tmp_path / "out")) == []
    counts = reopen.compare(tmp_path / "out", source, loaders, engines.get(engine))
    assert counts["packed"] == len(loaders)


@pytest.mark.parametrize("level", ["int4-g32-asym", "fp8-channel"])
def test_levels_that_no_kernel_for_experts_has_are_neither_planned_nor_passed(tmp_path: Path, level: str) -> None:
    source = Checkpoint.open(save("qwen3_moe", tmp_path / "m", **WIDE, moe_intermediate_size=128))
    wanted = {n: Level.parse(level) for n in source.names if ".experts." in n}
    encode = lambda n: Nearest().encode(source.read(n)[None], wanted[n], torch.float32, base.Statistics())[0]  # noqa: E731
    write.write(tmp_path / "out", source, {n: partial(encode, n) for n in wanted}, engines.get("vllm"), {}, wanted)
    assert any("experts" in line for line in problems(Checkpoint.open(tmp_path / "out")))
    assert not engines.get("vllm").takes(Level.parse(level), 128, True)
    assert engines.get("vllm").takes(Level.parse(level), 128)
    assert "w1" in str(engines.get("vllm").refuses("mlp.gate", (64, 64), False, 0, "a.experts.0.w1.weight"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_stay_are_ignored_under_the_names_that_vllm_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("families.WRITTEN", {"gpt_oss": WRITTEN["mixtral"] | {"head_dim": 16, "pad_token_id": 0}} | WRITTEN)
    written(tmp_path, "vllm", "int4-g32-sym", "experts", family)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    linear, room = torch.nn.Linear(1, 1), "block_sparse_moe" if family == "mixtral" else "mlp"
    assert is_match(f"model.layers.1.{room}.experts.0.gate_proj", linear, config["ignore"])
    assert not is_match(f"model.layers.11.{room}.experts.0.gate_proj", linear, config["ignore"])
    assert problems(Checkpoint.open(tmp_path / "out")) == []
    groups(lambda q: q["ignore"].pop())(tmp_path / "out")
    assert any("by which the experts of" in line for line in problems(Checkpoint.open(tmp_path / "out")))


def groups(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Changes the first group of the config."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return edit


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})

    return edit


GROUP, UNIT = "group_0", "model.layers.0.self_attn.q_proj.weight_global_scale"
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("level", "edit", "words"),
    [
        ("int4-g32-sym", groups(lambda q: q.update(sparsity_config={"format": "dense"})), "sparsity_config"),
        ("int4-g32-sym", groups(lambda q: q["ignore"].pop()), "neither a target nor in ignore"),
        ("int4-g32-sym", groups(lambda q: q["ignore"].append("model.layers.0.mlp.up_proj")), "is compressed, but ignored"),
        ("int4-g32-sym", groups(lambda q: q["config_groups"][GROUP]["targets"].remove("model.layers.0.mlp.up_proj")), "no group"),
        ("int4-g32-sym", groups(lambda q: q["config_groups"][GROUP]["weights"].update(num_bits=3)), "integers of"),
        ("int4-g32-sym", groups(lambda q: q["config_groups"][GROUP]["weights"].update(group_size=64)), "kernel loads"),
        ("int4-g32-sym", groups(lambda q: q["config_groups"][GROUP]["weights"].update(symmetric=False)), "zero_point is missing"),
        ("int4-g32-sym", groups(lambda q: q["config_groups"].update(other=q["config_groups"][GROUP])), "of 2 groups"),
        ("int4-g32-sym", groups(lambda q: q.update(kv_cache_scheme=CACHE)), "k_scale is missing"),
        ("int4-g32-sym", groups(lambda q: q.update(kv_cache_scheme=CACHE | {"num_bits": 4})), "not static symmetric FP8"),
        ("int4-g32-sym", tensors(lambda t: t.pop("model.layers.0.mlp.up_proj.weight_shape")), "weight_shape is missing"),
        ("nvfp4-g16", tensors(lambda t: t.update({UNIT: t[UNIT] * 2})), "different NVFP4 units"),
        ("fp8-channel", groups(lambda q: q["config_groups"][GROUP]["weights"].update(strategy="group")), "a row or a block"),
    ],
)
def test_what_the_loader_would_refuse_is_named(tmp_path: Path, level: str, edit: Callable[[Path], None], words: str) -> None:
    source, loaders = written(tmp_path, "vllm", level)
    edit(tmp_path / "out")
    found = problems(Checkpoint.open(tmp_path / "out"))
    assert any(words in line for line in found), found
    if level == "nvfp4-g16":
        with pytest.raises(ShortfallError):
            reopen.compare(tmp_path / "out", source, loaders, engines.get("vllm"))


def test_joined_layers_share_their_nvfp4_unit_and_keep_their_values(tmp_path: Path) -> None:
    source = Checkpoint.open(save("llama", tmp_path / "m", **WIDE))
    names = [f"model.layers.0.self_attn.{m}_proj.weight" for m in "qkv"]
    level = Level.parse("nvfp4-g16")

    def encode(factor: float, name: str) -> Packed:
        return Nearest().encode(source.read(name).float()[None] * factor, level, torch.float32, base.Statistics())[0]

    loaders = {n: partial(encode, f, n) for n, f in zip(names, (1, 3, 0.4), strict=True)}
    shared = share_units(loaders, dict.fromkeys(names, level))
    own = {n: load() for n, load in loaders.items()}
    assert len({w.global_scale.item() for w in own.values()}) > 1  # type: ignore[attr-defined]
    assert len({load().global_scale.item() for load in shared.values()}) == 1  # type: ignore[attr-defined]
    assert all(torch.equal(shared[n]().decode(), own[n].decode()) for n in names)
    far = {n: partial(encode, f, n) for n, f in zip(names, (1, 2.0**-18, 1), strict=True)}
    with pytest.raises(ShortfallError, match="k_proj.*too small"):
        share_units(far, dict.fromkeys(names, level))[names[1]]()
