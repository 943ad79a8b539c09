"""Transforms of a checkpoint: variants of the families, ties, dtypes, chains, what is refused, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lively import Made, difference, enliven, logits, transformed
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer, text_file
from transformers import AutoModel, AutoModelForCausalLM

import assay
from assay import engines
from assay.engines.write import write
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import PackedInteger
from assay.model.progress import Silent
from assay.transforming import transform

FREE = ["norm_fold", "rotate_heads", "rotate"]
VARIANTS = [
    ("llama", {"tie_word_embeddings": True}, FREE),
    ("llama", {"attention_bias": True, "mlp_bias": True}, FREE),
    ("llama", {"num_key_value_heads": 4}, FREE),
    ("llama", {"hidden_size": 36, "head_dim": 16}, FREE),
    ("phi3", {"tie_word_embeddings": True}, FREE),
    ("gpt2", {"tie_word_embeddings": False}, FREE),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}, FREE),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, FREE),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, FREE),
    ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}, FREE),
    ("qwen3_moe", {"mlp_only_layers": [0]}, FREE),
    ("mamba", {"use_bias": True, "tie_word_embeddings": False}, ["norm_fold", "rotate"]),
    ("gemma2", {"tie_word_embeddings": False}, ["norm_fold", "rotate_heads"]),
]


@pytest.mark.parametrize(("family", "changes", "names"), VARIANTS)
def test_variants_of_a_family_keep_their_function(family: str, changes: dict, names: list[str], tmp_path: Path) -> None:
    given = enliven(family, tmp_path / "in", **changes)
    for place, chosen in enumerate(
        (names, ["awq", "rotate_heads"] if "rotate_heads" in names else ["awq"], ["permute_channels"])
    ):
        assert difference(logits(transformed(given, chosen, tmp_path / str(place))), given.logits) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "normalises the residual stream itself"),
        ("opt", {"word_embed_proj_dim": 32}, "can't place"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "adds the output of a norm"),
    ],
)
def test_variants_that_are_not_exact_are_refused(family: str, changes: dict, words: str, tmp_path: Path) -> None:
    given = enliven(family, tmp_path / "in", **changes)
    for name in ("norm_fold", "rotate"):
        with pytest.raises(InputError, match=words):
            transformed(given, [name], tmp_path / "out")
    assert difference(logits(transformed(given, ["rotate_heads"], tmp_path / "heads")), given.logits) < 1e-5


def test_a_model_without_its_head_and_an_unknown_family_are_refused(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    AutoModel.from_pretrained(given.folder).save_pretrained(tmp_path / "body")
    with pytest.raises(InputError, match="no head behind a final norm"):
        transform(Checkpoint.open(tmp_path / "body"), ["rotate"], tmp_path / "out", None, 0, Silent())
    config = json.loads((given.folder / "config.json").read_text())
    (given.folder / "config.json").write_text(json.dumps(config | {"model_type": "olmo", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match="doesn't know which tensors of olmo feed which"):
        transform(Checkpoint.open(given.folder), ["rotate"], tmp_path / "out", None, 0, Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stored_as_one_tensor_are_folded_one_by_one(family: str, tmp_path: Path) -> None:
    given = enliven(family, tmp_path / "in")
    running = {n: t.contiguous() for n, t in given.model.state_dict().items()}
    save_file(running, given.folder / "model.safetensors", {"format": "pt"})
    source = Checkpoint.open(given.folder)
    profile = Made(given.folder, {"model": source.fingerprint})
    experts = [n for n in source.names if ".experts." in n]
    for name in ("awq", "smooth_quant_plus", "svd_smooth", "permute_channels", "rotate"):
        made = transform(source, [name], tmp_path / name, profile, 0, Silent())
        assert any(not torch.equal(source.read(n), made.read(n)) for n in experts)
        assert difference(logits(AutoModelForCausalLM.from_pretrained(made.folder)), given.logits) < 1e-5


def test_a_tied_head_stays_tied_where_it_can_and_grows_the_files_where_not(tmp_path: Path) -> None:
    given = enliven("gpt2", tmp_path / "in")
    reports = {name: assay.transform(given.folder, tmp_path / name, name) for name in ("norm_fold", "rotate")}
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in reports}
    assert configs["norm_fold"]["tie_word_embeddings"] is True
    assert "keeps its gains" in reports["norm_fold"]["steps"][0]["notes"][0]
    assert reports["norm_fold"]["bytes"] == reports["norm_fold"]["source_bytes"]
    assert configs["rotate"]["tie_word_embeddings"] is False
    assert "16384 bytes more" in reports["rotate"]["steps"][0]["notes"][0]
    assert reports["rotate"]["bytes"] >= reports["rotate"]["source_bytes"] + 16384


def test_dtypes_stay_and_what_is_not_touched_is_copied_bit_by_bit(tmp_path: Path) -> None:
    given = enliven("qwen2", tmp_path / "in")
    given.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    before = load_file(tmp_path / "half" / "model.safetensors")
    transform(Checkpoint.open(tmp_path / "half"), ["rotate_heads"], tmp_path / "out", None, 0, Silent())
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    touched = {n for n in before if not torch.equal(before[n], after[n])}
    assert touched == {n for n in before if "v_proj" in n or "o_proj" in n}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert difference(logits(loaded), logits(rounded)) < 0.02


def test_fp8_weights_become_bfloat16(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    tensors = load_file(given.folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = torch.ones(1)
    save_file(tensors, given.folder / "model.safetensors", {"format": "pt"})
    config = json.loads((given.folder / "config.json").read_text())
    (given.folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    transform(Checkpoint.open(given.folder), ["rotate_heads"], tmp_path / "out", None, 0, Silent())
    made = Checkpoint.open(tmp_path / "out")
    assert "quantization_config" not in made.config
    assert {made.dtype(n) for n in made.names if n.endswith("_proj.weight")} == {torch.bfloat16}


def test_gains_of_zero_that_hide_a_bias_are_refused(tmp_path: Path) -> None:
    given = enliven("falcon", tmp_path / "in")
    path = given.folder / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.input_layernorm.weight"][3] = 0
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"h\.1\.input_layernorm has gains of zero"):
        transform(Checkpoint.open(given.folder), ["norm_fold"], tmp_path / "out", None, 0, Silent())


def test_weights_beyond_fp16_are_refused_before_anything_is_left(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    given.model.model.layers[0].input_layernorm.weight.data *= 2e4
    given.model.model.layers[0].self_attn.q_proj.weight.data *= 16
    given.model.half().save_pretrained(given.folder)
    with pytest.raises(InputError, match="leave the range of float16"):
        transform(Checkpoint.open(given.folder), ["norm_fold"], tmp_path / "out", None, 0, Silent())
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no transform was named; there are awq"),
        (["rotat"], "did you mean rotate"),
        (["awq"], "awq reads statistics; give a profile"),
        (["rotate", "awq"], "awq reads statistics"),
        (["awq:bit=3"], "did you mean bits"),
        (["rotate:bits=3"], "rotate has no parameter 'bits'; it has none"),
        (["awq:bits=x"], "awq:bits: 'x' is not a whole number above zero"),
        (["permute_channels:hidden=no"], "neither true nor false"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(names: list[str], words: str, tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    with pytest.raises(InputError, match=words) as caught:
        transform(Checkpoint.open(given.folder), names, tmp_path / "out", None, 0, Silent())
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["awq", "smooth_quant_plus", "svd_smooth"])
def test_rounding_that_no_integers_have_is_refused(name: str, tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    save_tokenizer(given.folder)
    assay.profile(given.folder, tmp_path / "p", calibration=text_file(tmp_path), tokens=512, window=32)
    for parameter, words in (("bits=99", "int has 2, 3, 4, 5, 6, 7, 8 bits, not 99"), ("group_size=7", "7: choose 32, 64, 128")):
        with pytest.raises(InputError, match=words):
            assay.transform(given.folder, tmp_path / "out", f"{name}:{parameter}", profile=tmp_path / "p")
    assert not (tmp_path / "out").exists()


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "in")
    source = Checkpoint.open(given.folder)
    with pytest.raises(InputError, match="awq reads statistics that rotate changes; put it first"):
        transform(source, ["rotate", "awq"], tmp_path / "out", Made(given.folder, {"model": source.fingerprint}), 0, Silent())
    with pytest.raises(InputError, match="a profile of another model"):
        transform(source, ["awq"], tmp_path / "out", Made(given.folder, {"model": "other"}), 0, Silent())


def test_a_compressed_model_is_refused(tmp_path: Path) -> None:
    source = Checkpoint.open(enliven("llama", tmp_path / "in").folder)
    name, level = "model.layers.0.mlp.up_proj.weight", Level(4, 32, False)
    packed = PackedInteger(
        level, torch.zeros(96, 64, dtype=torch.uint8), torch.ones(96, 2), torch.zeros(96, 2, dtype=torch.uint8)
    )
    write(tmp_path / "small", source, {name: lambda: packed}, engines.get("transformers"), {}, {name: level})
    with pytest.raises(InputError, match="is compressed already"):
        transform(Checkpoint.open(tmp_path / "small"), ["rotate"], tmp_path / "out", None, 0, Silent())


def test_from_a_profile_to_a_compressed_model_judged_against_the_original(tmp_path: Path) -> None:
    given = enliven("llama", tmp_path / "model")
    save_tokenizer(given.folder)
    text, settings = text_file(tmp_path), {"tokens": 512, "window": 32}
    profile = assay.profile(given.folder, tmp_path / "profile", calibration=text, **settings)
    assay.transform(given.folder, tmp_path / "scaled", ["awq:bits=3,group_size=32"], profile=profile.folder)
    report = assay.transform(tmp_path / "scaled", tmp_path / "turned", ["rotate", "rotate_heads"], seed=5)
    assert [s["name"] for s in report["steps"]] == ["rotate", "rotate_heads"]
    record = json.loads((tmp_path / "turned" / "assay" / "transform.json").read_text())
    assert [(s["name"], s["seed"]) for s in record["steps"]] == [("awq", 0), ("rotate", 5), ("rotate_heads", 5)]
    assert record["steps"][0]["parameters"] == {"bits": 3, "group_size": 32}
    assert record["source"] == Checkpoint.open(given.folder).fingerprint
    assert (tmp_path / "turned" / "tokenizer.json").exists()
    exact = assay.verify(tmp_path / "turned", given.folder, text=text, **settings)
    assert exact["kl"]["measured"] < 1e-6
    assay.compress(tmp_path / "turned", tmp_path / "out", bits=4.9, calibration=text, method="nearest", **settings)
    other = text_file(tmp_path / "scaled", "other words, then 0987654321 more of them.\n" * 60)
    verdicts = [assay.verify(tmp_path / "out", m, text=other, **settings) for m in (tmp_path / "turned", given.folder)]
    assert verdicts[0]["kl"]["measured"] == pytest.approx(verdicts[1]["kl"]["measured"], rel=1e-3)
    enliven("llama", tmp_path / "stranger", rms_norm_eps=1e-3)
    save_tokenizer(tmp_path / "stranger")
    with pytest.raises(InputError, match="made from another model"):
        assay.verify(tmp_path / "out", tmp_path / "stranger", text=other, **settings)
