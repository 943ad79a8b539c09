"""Tiny random models on disk with a tokenizer of single characters, and text they can read."""

from __future__ import annotations

from pathlib import Path

from families import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,\n"
TEXT = "the quick brown fox jumps over the lazy dog, 1234567890 times.\nwhy not 42.\n" * 60


def save(family: str, folder: Path, **changes) -> Path:
    """A tiny model of the family in `folder`; returns it."""
    _, model = build(family, **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, letters: str = LETTERS) -> None:
    vocabulary = {"<unk>": 0} | {c: i + 1 for i, c in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def text_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text)
    return path
