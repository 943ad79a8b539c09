"""Calibration and evaluation text: built in, from a file, or from a data set on the hub; cut into windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError

BUILTIN = "builtin"
Split = Literal["calibration", "evaluation"]
FIRST_CHARACTERS = 1 << 14
"""Of a document, to see how many its tokens have."""
_FIELDS = ("text", "content", "messages", "prompt")


@dataclass(frozen=True)
class Windows:
    """Token windows without padding. ids: int64 [windows, length]; source names the text; digest hashes the ids."""

    ids: Tensor
    source: str

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:32]


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises InputError when it is missing, empty, or code of its own."""
    if checkpoint.method == "gguf" and not checkpoint.side_files():
        wanted = "put tokenizer.json and config.json of the original model beside it"
        raise InputError(f"{checkpoint.folder}: a GGUF file alone, whose tokenizer only llama.cpp can run; {wanted}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            problem = f"{checkpoint.folder}: the tokenizer is code, which assay never runs"
            wanted = "remove auto_map and tokenizer_class from tokenizer_config.json if tokenizer.json does without it"
            raise InputError(f"{problem}; {wanted}") from error
        raise InputError(f"{checkpoint.folder}: no usable tokenizer ({str(error).splitlines()[0]})") from error
    if len(tokenizer) == 0:
        raise InputError(f"{checkpoint.folder}: the tokenizer is empty; copy tokenizer.json from the original model")
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary: profiles made with another tokenizer are refused by it."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]


def windows(checkpoint: Checkpoint, text: str | Path | None, split: Split, tokens: int, length: int, vocabulary: int) -> Windows:
    """`tokens` tokens of the text in windows of `length`, in the order of the text.

    `split` ("calibration" or "evaluation") picks the part of the built-in text when `text` is None or
    "builtin". Raises InputError for text that is missing, binary, empty or shorter than one window, and
    for token ids beyond the model's vocabulary.
    """
    tokenizer = load_tokenizer(checkpoint)
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    source = str(text or BUILTIN)
    ids: list[int] = []
    for document in _documents(source, split):
        ids += _tokenized(tokenizer, document, tokens - len(ids))
        if source == BUILTIN:
            ids += separator
        if len(ids) >= tokens:
            break
    count = min(len(ids), tokens) // length
    if count == 0:
        raise InputError(f"{source}: {len(ids)} tokens where one window needs {length}; give more text")
    if max(ids) >= vocabulary:
        raise InputError(f"token {max(ids)} is beyond the model's {vocabulary}: tokenizer and model don't match")
    return Windows(torch.tensor(ids[: count * length]).view(count, length), f"{source}:{split}")


def reread(checkpoint: Checkpoint, facts: Mapping[str, Any], vocabulary: int, text: str | Path | None = None) -> Windows:
    """The windows that a profile was measured on, or those of another text in their places.

    facts: what its index says of its calibration; a text that has changed since shows by the digest. Raises InputError.
    """
    source = text or str(facts["source"]).removesuffix(":calibration")
    found = windows(checkpoint, source, "calibration", facts["pool"], facts["window"], vocabulary)
    picked = torch.tensor(facts["picked"], dtype=torch.long)
    if len(picked) == 0 or int(picked.max()) >= len(found.ids):
        return found
    return Windows(found.ids[picked], found.source)


def seen(checkpoint: Checkpoint, facts: Mapping[str, Any], vocabulary: int, text: str | Path) -> bool:
    """Whether a text file holds the very windows that a result was calibrated on, in their places; facts: see `reread`.

    Data sets and the built-in text have parts for calibration and for evaluation, which never meet.
    """
    if str(text) == BUILTIN or not Path(text).exists():
        return False
    with suppress(InputError):  # too short for the windows of calibration, say
        return reread(checkpoint, facts, vocabulary, text).digest == facts["digest"]
    return False


def recall(checkpoint: Checkpoint, facts: Mapping[str, Any], vocabulary: int, purpose: str) -> Windows:
    """`reread` of the text itself. Raises InputError, naming the purpose, where it is no longer there."""
    found = reread(checkpoint, facts, vocabulary)
    if found.digest != facts["digest"]:
        source = str(facts["source"]).removesuffix(":calibration")
        raise InputError(f"{source} has changed since the profile was measured, and {purpose} needs it; measure again")
    return found


def _tokenized(tokenizer: PreTrainedTokenizerBase, document: str, wanted: int) -> list[int]:
    """At least `wanted` tokens of the document, or all it has; reads no further than it needs."""
    size = FIRST_CHARACTERS
    while True:
        ids: list[int] = tokenizer(document[:size], add_special_tokens=False, verbose=False)["input_ids"]
        # the cut may have changed the last few tokens
        if size >= len(document) or len(ids) >= wanted + 64:
            return ids
        size = max(2 * size, int(1.05 * (wanted + 64) * size / max(1, len(ids))))


def _documents(source: str, split: Split) -> Iterator[str]:
    if source == BUILTIN:
        from assay.builtin.corpus import corpus

        try:
            documents = corpus(split)
        except FileNotFoundError as error:
            option = "--calibration" if split == "calibration" else "--text"
            raise InputError(f"{error}; give a text file with {option}") from error
        yield from (document.text for document in documents)
        return
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a folder; give a text or JSONL file")
    if not path.exists():
        if source.count("/") == 1 and not path.suffix:
            yield from _hub(source, split)
            return
        raise InputError(f"calibration text {source} does not exist")
    yield from _file(path)


def _file(path: Path) -> Iterable[str]:
    raw = path.read_bytes()
    if b"\0" in raw[:65536]:
        raise InputError(f"{path}: binary; give plain text or JSONL")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if not text.strip():
        raise InputError(f"{path}: empty; give some text")
    return [text] if path.suffix != ".jsonl" else [_row(path, i, row) for i, row in enumerate(text.split("\n")) if row.strip()]


def _row(path: Path, line: int, row: str) -> str:
    try:
        value = json.loads(row)
        found = _said(value)
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{path}:{line + 1}: half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{line + 1}: not JSON ({error})") from error
    except TypeError:
        raise InputError(f"{path}:{line + 1}: no field {' or '.join(_FIELDS)}") from None
    return found


def _said(value: Any) -> str:
    """The text of a row. Raises TypeError where there is none."""
    if isinstance(value, str):
        return value
    found = next((value[f] for f in _FIELDS if isinstance(value, dict) and f in value), None)
    if isinstance(found, list) and all(isinstance(message, dict) for message in found):
        return "\n".join(str(message.get("content", "")) for message in found)
    if not isinstance(found, str):
        raise TypeError
    return found


def _hub(name: str, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"calibration data set {name}: pip install datasets, or give a file") from None
    try:
        rows = load_dataset(name, split="validation" if split == "calibration" else "test", streaming=True)
        yield from map(_said, rows)
    except (OSError, ValueError, ConnectionError) as error:
        raise InputError(f"calibration data set {name}: {str(error).splitlines()[0]}") from error
    except TypeError:
        raise InputError(f"calibration data set {name}: no field {' or '.join(_FIELDS)}") from None
