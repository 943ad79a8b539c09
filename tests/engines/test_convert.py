"""Moving a result between layouts keeps every weight to the bit, or is refused with what would change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines.samples import folder_of, random_packed, shuffled
from safetensors.torch import load_file, save_file
from tiny import save, text_file

import assay
from assay import engines
from assay.engines import write
from assay.engines.convert import TARGETS
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.terms import Exact, PackedSum

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def packed(folder: Path, engine: str, level: str, family: str = "llama", **changes: object) -> Path:
    """A result of one level."""
    source = Checkpoint.open(save(family, folder / "source", **WIDE | changes))
    wanted = Level.parse(level)
    names = [n for n in source.names if ".layers." in n and len(source.shape(n)) == 2 and "gate.weight" not in n]
    loaders = {n: (lambda i=i, n=n: random_packed(wanted, *source.shape(n), source.dtype(n), i)) for i, n in enumerate(names)}
    write.write(folder / "out", source, loaders, engines.get(engine), {}, dict.fromkeys(names, wanted))
    return folder / "out"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    source = Checkpoint.open(folder)
    return {name: source.read(name) for name in source.names}


PATHS = [
    ("transformers", "int4-g32-sym", ["gptq", "awq", "assay", "compressed-tensors"]),
    ("transformers", "int4-g64-asym", ["awq", "gptq", "compressed-tensors", "plain"]),
    ("assay", "int3-g32-asym", ["gptq", "compressed-tensors"]),
    ("gptq", "int8-channel-sym", ["compressed-tensors", "assay", "gptq"]),
]


@pytest.mark.parametrize(("engine", "level", "path"), PATHS, ids=lambda x: str(x))
def test_weights_stay_what_they_are_along_a_path_of_layouts(tmp_path: Path, engine: str, level: str, path: list[str]) -> None:
    at = packed(tmp_path, engine, level)
    first = weights_of(at)
    for place, to in enumerate(path):
        report = assay.convert(at, to, tmp_path / str(place))
        at = tmp_path / str(place)
        found = weights_of(at)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype is t.dtype for n, t in first.items()), to
        assert report["bytes"] == Checkpoint.open(at).weight_bytes
        quantization = Checkpoint.open(at).config.get("quantization_config") or {}
        assert quantization.get("quant_method", "plain") == to
        assert "sparsity_config" not in quantization


def test_symmetric_levels_survive_gptq_but_awq_names_them_by_their_zero_points(tmp_path: Path) -> None:
    at = packed(tmp_path, "transformers", "int4-g32-sym")
    for to, level in (("gptq", "int4-g32-sym"), ("awq", "int4-g32-asym")):
        assay.convert(at, to, tmp_path / to)
        assert {x.name for x in Checkpoint.open(tmp_path / to).levels.values()} == {level}
    assert Checkpoint.open(tmp_path / "gptq").config["quantization_config"]["checkpoint_format"] == "gptq"


@pytest.mark.parametrize(
    ("level", "to", "words"),
    [
        ("int3-g32-asym", "awq", "14 of 14 weights would have to be rounded anew"),
        ("int5-g32-sym", "gptq", "gptq has no int5-g32-sym"),
        ("int5-g32-sym", "gguff", "unknown layout"),
    ],
)
def test_what_a_layout_can_not_hold_is_refused_and_nothing_is_written(tmp_path: Path, level: str, to: str, words: str) -> None:
    at = packed(tmp_path, "transformers", level)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=words) as caught:
        assay.convert(at, to, tmp_path / "moved")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_mixed_plan_is_no_awq_checkpoint(tmp_path: Path) -> None:
    source = Checkpoint.open(save("llama", tmp_path / "m", **WIDE))
    names = [n for n in source.names if "proj" in n]
    levels = {n: Level(4, 32 if "down" in n else 64) for n in names}
    loaders = {n: (lambda n=n: random_packed(levels[n], *source.shape(n), source.dtype(n), 0)) for n in names}
    write.write(tmp_path / "out", source, loaders, engines.get("assay"), {}, levels)
    with pytest.raises(InputError, match=r"awq holds one level for all"):
        assay.convert(tmp_path / "out", "awq", tmp_path / "moved")
    assay.convert(tmp_path / "out", "gptq", tmp_path / "gptq")
    assert Checkpoint.open(tmp_path / "gptq").levels == levels


def test_one_level_inside_a_joined_projection(tmp_path: Path) -> None:
    source = Checkpoint.open(save("llama", tmp_path / "m", **WIDE))
    names = [n for n in source.names if "proj" in n]
    levels = {n: Level(8 if "q_proj" in n else 4, 32, True) for n in names}
    loaders = {n: (lambda n=n: random_packed(levels[n], *source.shape(n), source.dtype(n), 0)) for n in names}
    write.write(tmp_path / "out", source, loaders, engines.get("assay"), {}, levels)
    with pytest.raises(InputError, match=r"6 of 14 weights.*q_proj.*one matrix"):
        assay.convert(tmp_path / "out", "gptq", tmp_path / "moved")
    assert assay.convert(tmp_path / "out", "compressed-tensors", tmp_path / "ct")["engine"] == "transformers"


def test_codes_and_terms_fit_only_assay(tmp_path: Path) -> None:
    source = Checkpoint.open(save("llama", tmp_path / "m", **WIDE))
    name, level = "model.layers.0.mlp.down_proj.weight", Level(4, 32, sparse=0.01)
    plain = random_packed(level.base, *source.shape(name), source.dtype(name), 0)
    exact = Exact.of(source.read(name), source.read(name).abs() > 0.05, source.dtype(name))
    loaders = {name: lambda: PackedSum(level, plain, None, exact)}
    write.write(tmp_path / "out", source, loaders, engines.get("assay"), {}, {name: level})
    for to in sorted(TARGETS.keys() - {"assay", "plain"}):
        with pytest.raises(InputError, match="sparse0.01"):
            assay.convert(tmp_path / "out", to, tmp_path / "moved")


def test_groups_that_are_not_neighbours_only_move_to_layouts_that_name_them(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "m", **WIDE)
    source = Checkpoint.open(model)
    names = [n for n in source.names if "proj" in n]
    weights = {
        n.removesuffix(".weight"): shuffled(random_packed(Level(4, 32, True), *source.shape(n), torch.float32, i), i)
        for i, n in enumerate(names)
    }
    other = folder_of(tmp_path / "q", "gptq", weights)
    stored = dict(other.iter_raw(other.stored)) | {n: source.read(n) for n in source.names if n not in names}
    save_file(stored, tmp_path / "q" / "model.safetensors")
    config = source.config | {"quantization_config": other.config["quantization_config"]}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert config["quantization_config"]["desc_act"] is True
    with pytest.raises(InputError, match="neighbouring"):
        assay.convert(tmp_path / "q", "compressed-tensors", tmp_path / "moved")
    before = weights_of(tmp_path / "q")
    assay.convert(tmp_path / "q", "assay", tmp_path / "a")
    assay.convert(tmp_path / "a", "gptq", tmp_path / "back")
    assert Checkpoint.open(tmp_path / "back").config["quantization_config"]["desc_act"] is True
    for folder in ("a", "back"):
        assert all(torch.equal(t, before[n]) for n, t in weights_of(tmp_path / folder).items())
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == stored.keys()


def test_experts_of_a_layer_move_together(tmp_path: Path) -> None:
    at = packed(tmp_path, "vllm", "int4-g32-sym", "qwen3_moe")
    first = weights_of(at)
    assay.convert(at, "gptq", tmp_path / "gptq")
    assert any("experts.0." in n and n.endswith("qweight") for n in Checkpoint.open(tmp_path / "gptq").stored)
    assay.convert(tmp_path / "gptq", "compressed-tensors", tmp_path / "ct")
    for folder in ("gptq", "ct"):
        assert all(torch.equal(t, first[n]) for n, t in weights_of(tmp_path / folder).items())


def test_the_recipe_goes_with_the_weights(tmp_path: Path) -> None:
    model, text = save("llama", tmp_path / "m", **WIDE), text_file(tmp_path)
    assay.compress(model, tmp_path / "out", level="int4-g32-sym", calibration=text, tokens=256, window=32)
    assay.convert(tmp_path / "out", "gptq", tmp_path / "moved")
    first, second = (json.loads((tmp_path / f / "assay" / "recipe.json").read_text()) for f in ("out", "moved"))
    first.pop("damage")
    assert second == first | {"engine": "gptq"}
    other = tmp_path / "other.txt"
    other.write_text("the lazy dog jumps. " * 40)
    verdicts = [assay.verify(tmp_path / f, model, text=other, tokens=256, window=32) for f in ("out", "moved")]
    assert verdicts[0]["kl"] == verdicts[1]["kl"]
    assert verdicts[0]["restore"] and not verdicts[1]["restore"]


def test_experts_under_names_that_vllm_does_not_find_stay_with_gptq(tmp_path: Path) -> None:
    at = packed(tmp_path, "gptq", "int4-g32-sym", "mixtral")
    with pytest.raises(InputError, match=r"24 of 32 weights.*not w1 "):
        assay.convert(at, "compressed-tensors", tmp_path / "moved")
