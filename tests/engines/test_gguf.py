"""GGUF files of float models: llama.cpp computes what transformers computes, from the same tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from engines import real_gguf as real
from families import build
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from tiny import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import assay
from assay import engines
from assay.engines.gguf import reopen, write
from assay.engines.gguf.metadata import rope_tensors
from assay.engines.gguf.tokens import vocabulary
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError
from assay.model.gguf_layout import Target, facts, targets
from assay.model.sites import load_config

CONTRACT = engines.get("llama.cpp")
TOLERANCE = {"gemma": 1e-2, "gemma2": 1e-2, "gemma3_text": 1e-2, "gpt2": 1e-2}
"""llama.cpp looks GELU up in a table of fp16 numbers."""


def convert(source: Path, out: Path) -> Path:
    checkpoint = Checkpoint.open(source)
    write.write(out, checkpoint, {}, CONTRACT, {}, {})
    reopen.compare(out, checkpoint, {}, CONTRACT)
    return out / write.FILE


@pytest.mark.parametrize("family", real.FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    made = real.lively(family, tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(real.SAMPLE)["input_ids"]
    with real.reader(path) as model:
        assert model.tokens(real.SAMPLE) == ids
    with torch.no_grad():
        wanted = made.model(torch.tensor([ids])).logits[0]
    assert (real.llama_logits(path, ids) - wanted).abs().max() <= TOLERANCE.get(family, 1e-4)


@pytest.mark.parametrize("family", real.FAMILIES)
def test_tensors_have_the_names_that_the_gguf_package_gives_them(tmp_path: Path, family: str) -> None:
    real.lively(family, tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == facts()["families"][family]["arch"])
    theirs = get_tensor_name_map(MODEL_ARCH(arch), 6)
    found, dropped = targets(load_config(checkpoint).to_dict(), checkpoint.names)
    assert {name for t in found.values() for name in t.sources} | set(dropped) == set(checkpoint.names)
    for target in found.values():
        plain = re.sub(r"experts\.\d+\.", "experts.", target.sources[0])
        assert theirs.get_name(plain, try_suffixes=(".weight", ".bias")) == target.name


SPLITS = [(name, splits) for name, splits in facts()["pretokenizers"].items() if name not in ("gpt-2", "smollm")]


@pytest.mark.parametrize(("name", "splits"), SPLITS)
def test_every_way_of_splitting_text_gives_the_same_tokens_in_llama_cpp(tmp_path: Path, name: str, splits: list[str]) -> None:
    save("llama", tmp_path / "model", vocab_size=real.SIZE)
    real.save_tokenizer(tmp_path / "model", real.byte_level(splits[0], name in facts()["ignores_merges"]))
    assert vocabulary(tmp_path / "model", real.SIZE).before == name
    same_tokens(tmp_path)


def test_single_digits_are_split_as_in_smollm(tmp_path: Path) -> None:
    save("llama", tmp_path / "model", vocab_size=real.SIZE)
    tokenizer = real.byte_level()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    real.save_tokenizer(tmp_path / "model", tokenizer)
    assert vocabulary(tmp_path / "model", real.SIZE).before == "smollm"
    same_tokens(tmp_path)


def test_a_unigram_tokenizer_gives_the_same_tokens(tmp_path: Path) -> None:
    save("llama", tmp_path / "model", vocab_size=real.SIZE)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([real.TEXT], trainer)
    real.save_tokenizer(tmp_path / "model", tokenizer)
    assert vocabulary(tmp_path / "model", real.SIZE).kind == "t5"
    same_tokens(tmp_path, "the quick brown fox jumps over, why not 42.")


def same_tokens(folder: Path, text: str = real.SAMPLE) -> None:
    path = convert(folder / "model", folder / "out")
    wanted = AutoTokenizer.from_pretrained(folder / "model")(text)["input_ids"]
    with real.reader(path) as model:
        assert model.tokens(text) == wanted


@pytest.mark.parametrize("rope", [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16, "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0, "attention_factor": 1.5},
], ids=lambda r: f"{r['rope_type']}-{r.get('attention_factor')}")  # fmt: skip
def test_scaled_rotary_positions_are_those_of_transformers(tmp_path: Path, rope: dict) -> None:
    made = real.lively("llama", tmp_path / "model", rope_parameters=rope)
    path = convert(tmp_path / "model", tmp_path / "out")
    ids = list(range(2, 58))
    with torch.no_grad():
        wanted = made.model(torch.tensor([ids])).logits[0]
    assert (real.llama_logits(path, ids) - wanted).abs().max() <= 1e-3
    if rope["rope_type"] == "yarn":
        alone = path.rename(tmp_path / "alone.gguf")
        assert (assay.load(alone).float()(torch.tensor([ids])).logits[0] - wanted).abs().max() <= 1e-3


def test_frequencies_of_llama_3_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
    config, model = build("llama", rope_parameters=rope)
    factors = rope_tensors(config.to_dict())["rope_freqs.weight"]
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)


def test_rows_of_heads_come_back_to_their_places() -> None:
    target = Target("x", ("x",), heads=3)
    weight = torch.arange(24.0)[:, None].expand(24, 5)
    moved = target.forward(weight)
    assert moved[:4, 0].tolist() == [0, 4, 1, 5]
    assert torch.equal(target.backward(moved), weight)


def test_a_name_without_the_usual_prefix_is_found(tmp_path: Path) -> None:
    config = json.loads((save("gpt2", tmp_path / "m") / "config.json").read_text())
    full, _ = targets(load_config(Checkpoint.open(tmp_path / "m")).to_dict(), ["transformer.h.0.ln_1.weight"])
    short, dropped = targets({**config, "n_inner": None}, ["h.0.ln_1.weight", "h.0.attn.bias"])
    assert list(full) == list(short) == ["blk.0.attn_norm.weight"]
    assert dropped == {"h.0.attn.bias": "llama.cpp makes it itself"}


# ---- what can't be held ----------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    out = folder.parent / "out"
    with pytest.raises(InputError, match=match):
        write.write(out, Checkpoint.open(folder), {}, CONTRACT, {}, {})
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_family_without_a_layout_is_refused(tmp_path: Path) -> None:
    refused(save("gpt_neox", tmp_path / "m"), "no GGUF layout is known for gpt_neox")


def test_settings_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    refused(save("llama", tmp_path / "m", hidden_act="relu"), "hidden_act silu; this one has relu")


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(("family", "change", "words"), [
    *((f, {"attention_bias": True}, "attention_bias False; this one has True")
      for f in ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor 1.0; this one has 0.5"),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 4.0}}, "beta_fast 32; this model has 4.0"),
    ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale None; this model has 1.0"),
])  # fmt: skip
def test_attention_that_llama_cpp_lacks_is_refused(tmp_path: Path, family: str, change: dict, words: str) -> None:
    real.lively(family, tmp_path / "m", **change)
    refused(tmp_path / "m", words)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3"])
def test_a_window_that_llama_cpp_lacks_bounds_the_context(tmp_path: Path, family: str) -> None:
    for window, most in ((8, 8), (None, 64), (100, 64)):
        real.lively(family, tmp_path / f"{window}", sliding_window=window)
        reader = GGUFReader(convert(tmp_path / f"{window}", tmp_path / f"{window}-out"))
        key = next(k for k in reader.fields if k.endswith(".context_length") and "original" not in k)
        assert reader.fields[key].contents() == most


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    refused(tmp_path / "m", "copy tokenizer.json or tokenizer.model")


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    refused(save("llama", tmp_path / "m"), "no tokenizers of type WordLevel")


def test_an_unknown_way_to_split_text_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "m", vocab_size=real.SIZE)
    real.save_tokenizer(tmp_path / "m", real.byte_level(r"\w+|\W+"))
    refused(tmp_path / "m", "no name for the way")


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "m")
    real.save_tokenizer(tmp_path / "m", real.byte_level())
    refused(tmp_path / "m", "tokenizer and model don't match")


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    save("llama", tmp_path / "m", vocab_size=real.SIZE)
    real.save_tokenizer(tmp_path / "m", real.byte_level())
    path = convert(tmp_path / "m", tmp_path / "out")
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 5)
        byte = file.read(1)[0]
        file.seek(int(tensor.data_offset) + 5)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ShortfallError, match="up_proj.weight does not read back"):
        reopen.compare(tmp_path / "out", Checkpoint.open(tmp_path / "m"), {}, CONTRACT)


def test_a_source_cut_short_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    save("llama", tmp_path / "m", vocab_size=real.SIZE)
    real.save_tokenizer(tmp_path / "m", real.byte_level())
    path = convert(tmp_path / "m", tmp_path / "out")
    read = Checkpoint.open(path).stored["model.layers.1.mlp.up_proj.weight"].read
    assert read is not None
    path.open("r+b").truncate(4096)
    with pytest.raises(InputError, match="ffn_up.weight can't be decoded .*ends too early"):
        read()
