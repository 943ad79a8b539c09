"""A tokenizer as a GGUF file holds it: tokens with types and scores, merges, special ids, how text is split first."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from assay.model.errors import InputError
from assay.model.gguf_layout import facts

GPT2_SPLIT = facts()["pretokenizers"]["gpt-2"][0]
SPACE = "▁"
UNMERGED = -1e6
"""The score of a token that no merge makes."""
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """kind: llama.cpp's tokenizer ("gpt2" bytes and merges, "llama" SentencePiece merges, "t5" unigrams); before: how text
    is split first; tokens, scores, types: one an id; merges: pairs in order, where the kind has them; ids: of special
    tokens; flags: `add_bos_token` and the like; template: of chats; charsmap: SentencePiece's table of normal forms.
    """

    kind: str
    before: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    ids: Mapping[str, int]
    flags: Mapping[str, bool]
    template: str | None
    charsmap: bytes = b""

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the metadata."""
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.before)
        writer.add_token_list(self.tokens)
        if self.kind != "gpt2":
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.charsmap:
            writer.add_precompiled_charsmap(self.charsmap)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a model with `size` tokens, unused ones filled up. Raises InputError where llama.cpp has no such kind.

    tokenizer.json or tokenizer.model is read through transformers.
    """
    tokenizer, description = _load(folder)
    model = description["model"]
    named: dict[str, int] = dict(tokenizer.get_vocab())
    if not named or max(named.values()) >= size:
        raise InputError(f"{folder}: {len(named)} tokens where the model has {size}; tokenizer and model don't match")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    scores = [0.0] * size
    kind, made = _kind(folder, description)
    for text, i in named.items():
        tokens[i], types[i], scores[i] = text, int(_type(text, model, kind)), made.get(text, UNMERGED if kind == "llama" else 0.0)
    for added in description.get("added_tokens") or []:
        tokens[added["id"]], types[added["id"]] = _added(added, model, kind)
    merges = [" ".join(_pair(m)) for m in model["merges"]] if kind == "gpt2" else []
    before = _before(folder, description) if kind == "gpt2" else "default"
    charsmap = _charsmap(description) if kind == "t5" else b""
    flags = _flags(tokenizer, description, kind)
    return Vocabulary(kind, before, tokens, scores, types, merges, _ids(tokenizer), flags, _template(tokenizer), charsmap)


def _load(folder: Path) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        wanted = "copy tokenizer.json or tokenizer.model from the original model; a GGUF file holds its tokenizer"
        raise InputError(f"{folder}: no usable tokenizer ({str(error).splitlines()[0]}); {wanted}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{folder}: {type(tokenizer).__name__} has no tokenizer.json; llama.cpp can't hold it")
    return tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())


def _kind(folder: Path, description: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    """llama.cpp's name of a kind of tokenizer, and the scores of tokens."""
    model = description["model"]
    if model["type"] == "Unigram":
        return "t5", {text: float(score) for text, score in model["vocab"]}
    if model["type"] != "BPE":
        raise InputError(f"{folder}: llama.cpp has no tokenizers of type {model['type']}; --engine assay needs none")
    if not model.get("byte_fallback"):
        return "gpt2", {}
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        scores.setdefault("".join(_pair(merge)), -float(rank))
    return "llama", scores


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _type(text: str, model: Mapping[str, Any], kind: str) -> TokenType:
    if kind != "gpt2" and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return TokenType.BYTE
    unknown = model.get("unk_token")
    if unknown is None and isinstance(model.get("unk_id"), int):
        unknown = model["vocab"][model["unk_id"]][0]
    return TokenType.UNKNOWN if text == unknown else TokenType.NORMAL


def _added(added: Mapping[str, Any], model: Mapping[str, Any], kind: str) -> tuple[str, int]:
    text = str(added["content"])
    if _type(text, model, kind) == TokenType.UNKNOWN:
        return text, int(TokenType.UNKNOWN)
    if added["special"]:
        return text, int(TokenType.CONTROL)
    return text.replace(SPACE, " "), int(TokenType.USER_DEFINED)


def _before(folder: Path, description: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split before merges. Raises InputError for one that it doesn't know."""
    table, ignores = facts()["pretokenizers"], bool(description["model"].get("ignore_merges"))
    found = _splits(description.get("pre_tokenizer") or {})
    fitting = [name for name, splits in table.items() if splits == found]
    exact = [name for name in fitting if (name in facts()["ignores_merges"]) == ignores]
    if not fitting:
        raise InputError(f"{folder}: llama.cpp has no name for the way this tokenizer splits text: {found}")
    return (exact or fitting)[0]


def _splits(step: Mapping[str, Any]) -> list[str]:
    """The expressions that a pre-tokenizer splits by, one after another."""
    if step.get("type") == "Sequence":
        return [s for inner in step["pretokenizers"] for s in _splits(inner)]
    if step.get("type") == "ByteLevel":
        return ["a space in front of the text"] if step["add_prefix_space"] else [GPT2_SPLIT] if step["use_regex"] else []
    if step.get("type") == "Digits":
        return [r"\p{N}" if step["individual_digits"] else r"\p{N}+"]
    if step.get("type") == "Split":
        return [
            str(step["pattern"].get("Regex") or step["pattern"]) + ("" if step["behavior"] == "Isolated" else step["behavior"])
        ]
    return [str(step.get("type"))]


def _flags(tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any], kind: str) -> dict[str, bool]:
    ids = tokenizer("a")["input_ids"]
    flags = {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    if kind == "gpt2":
        return flags
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    flags["add_space_prefix"] = pieces[0].startswith(SPACE)
    if kind == "t5":
        flags["remove_extra_whitespaces"] = " {2,}" in json.dumps(description.get("normalizer"))
    return flags


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    return {name: int(number) for name, number in found.items() if number is not None}


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _charsmap(description: Mapping[str, Any]) -> bytes:
    steps = description.get("normalizer") or {}
    for step in steps.get("normalizers", [steps]):
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""
