"""Tiny models with tokenizers that were trained, and llama.cpp itself, where it is installed, as their reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from families import SETTINGS
from lively import Lively, enliven
from tiny import TEXT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from assay.model.gguf_layout import facts

SAMPLE = "The quick brown fox's 1234 jumps—over\n\n the  lazy dög.\t 中文 I'LL go! <s> 3,000"
CORPUS = [TEXT, SAMPLE, "It's 2024; we'll see, won't we? naïve café\r\n   indented"]
SIZE = 360
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "head_dim": 16, "num_hidden_layers": 4, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 16, "head_dim": 16, "num_hidden_layers": 6, "sliding_window": 512},
    "gemma": {"head_dim": 16},
    "qwen3_moe": {"norm_topk_prob": True},
}
SPM = ("gemma", "gemma2", "gemma3_text", "mistral", "phi3")
FAMILIES = tuple(facts()["families"])
SETTINGS.setdefault("gemma", SETTINGS["gemma2"])


def byte_level(split: str | None = None, ignore_merges: bool = False) -> Tokenizer:
    """Merges of bytes, of text split by an expression; None: as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = byte if split is None else pre_tokenizers.Sequence([_split(split), byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 10,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return (
        pre_tokenizers.Digits(individual_digits=True) if pattern == r"\p{N}" else pre_tokenizers.Split(Regex(pattern), "isolated")
    )


def sentence_piece() -> Tokenizer:
    """Merges of characters with bytes for those that are unknown, as Llama 2 and Gemma have them."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=start)
    # the trainer takes the bytes for special tokens, which no real file does
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(described))


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    names = {"eos_token": "<|end|>"} if tokenizer.token_to_id("<|end|>") is not None else {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def lively(family: str, folder: Path, **changes: Any) -> Lively:
    """A tiny float32 model of a family with a tokenizer of its kind."""
    made = enliven(family, folder, **({"vocab_size": SIZE} | CHANGES.get(family, {}) | changes))
    save_tokenizer(folder, sentence_piece() if family in SPM else byte_level())
    return made


@contextmanager
def reader(path: Path, tokens: int = 128) -> Iterator[Any]:
    """An open `llama_reader.Reader`; the test skips where llama.cpp is not installed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from engines.llama_reader import Reader

    opened = Reader(path, tokens)
    try:
        yield opened
    finally:
        opened.close()


def llama_logits(path: Path, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of llama.cpp."""
    with reader(path) as model:
        return model.logits(ids)
