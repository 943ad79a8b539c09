"""The built-in text corpus: what every CPython carries on disk.

Two sources: the library's own source, one document a module, and the English
reference text in ``pydoc_data``, one document a topic. Each document belongs
to exactly one split, decided by its family name alone: submodules share the
family of their top-level package, a module's tests share the family of the
module, and topics that quote one another share a family.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")

HELD_OUT_MODULES = 0.05
"""Share of module families held out, for calibration and again for evaluation."""
HELD_OUT_TOPICS = 0.15
"""The same for topic families: English is scarce, so more of it is held out."""
TESTS_KEPT = 0.5
"""Share of the ``test`` modules of training families that training reads."""
TEST_CHARS = 32_000
"""Longest stretch of one ``test`` module that is read, in characters."""
PIECE_CHARS = 6_000
"""Longest document of calibration and evaluation, in characters."""
SHORTEST = 200
"""Modules and topics of fewer characters are left out."""

SALT = "assay-builtin-691"

SKIPPED = frozenset(
    {
        "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3",
        "ensurepip", "turtledemo", "pydoc_data", "encodings", "test", "tests",
        "sitecustomize", "usercustomize", "__phello__", "__hello__", "stringprep",
        "entities",
    }
)  # fmt: skip

MODULE_FAMILIES = {
    "ntpath": "path", "posixpath": "path", "genericpath": "path", "macpath": "path",
    "sre_compile": "re", "sre_constants": "re", "sre_parse": "re", "sre": "re",
    "cProfile": "profile", "profiling": "profile", "pstats": "profile",
    "collections_abc": "collections", "threading_local": "threading",
    "dummy_thread": "threading", "dummy_threading": "threading",
    "pathlib_abc": "pathlib", "xmlrpc": "xml", "minidom": "xml", "sax": "xml",
    "httplib": "http", "urllib2": "urllib", "bz2": "lzma", "gzip": "lzma",
    "compression": "lzma", "chunk": "wave", "aifc": "wave", "sunau": "wave",
}  # fmt: skip
"""Modules whose text moved from one to the other between versions, or is shared."""

TOPIC_FAMILIES = {
    **dict.fromkeys(
        (
            "async", "attribute-access", "callable-types", "class", "compound",
            "context-managers", "customization", "else", "for", "function", "if",
            "numeric-types", "sequence-types", "specialnames", "try", "while", "with",
        ),
        "compound",
    ),
    **dict.fromkeys(("dynamic-features", "exceptions", "execmodel", "naming"), "execmodel"),
    "typesseq-mutable": "typesseq", "augassign": "assignment", "in": "comparisons",
    "identifiers": "id-classes", "floating": "integers",
}  # fmt: skip
"""Topics that repeat whole paragraphs of one another."""


@dataclass(frozen=True)
class Document:
    """One text. ``name`` is ``module:json.decoder`` or ``topic:lambda``, and
    ends in ``#i`` where it is the i-th piece of a longer one."""

    name: str
    text: str


def family(name: str) -> str:
    """The family of a document name: the unit that one split owns whole."""
    kind, _, rest = name.partition("#")[0].partition(":")
    if kind == "topic":
        return f"topic:{TOPIC_FAMILIES.get(rest, rest)}"
    parts = rest.split(".")
    if parts[0] == "test" and len(parts) > 1:
        parts = [parts[1].removeprefix("test_").partition("_")[0]]
    bare = parts[0].removeprefix("_py" if parts[0].startswith("_py") else "_")
    return f"module:{MODULE_FAMILIES.get(bare, bare)}"


def split_of(name: str) -> Split:
    """The split that owns a document name. Depends on nothing but the name."""
    owner = family(name)
    held_out = HELD_OUT_TOPICS if owner.startswith("topic:") else HELD_OUT_MODULES
    draw = _draw(owner)
    if draw < held_out:
        return "calibration"
    return "evaluation" if draw < 2 * held_out else "train"


@lru_cache(maxsize=len(SPLITS))
def _corpus(split: Split, stdlib: Path) -> tuple[Document, ...]:
    whole = [*_topics(split), *_modules(stdlib, split)]
    if split == "train":
        return tuple(sorted([*whole, *_tests(stdlib)], key=lambda d: _draw(d.name)))
    pieces = (piece for document in whole for piece in _pieces(document))
    return tuple(sorted(pieces, key=lambda d: _draw(d.name)))


def corpus(split: Split) -> list[Document]:
    """The documents of one split, in a fixed shuffled order.

    Training documents are whole; those of calibration and evaluation are
    pieces of at most ``PIECE_CHARS`` characters, so that the first N tokens
    are a fair sample. Raises ``FileNotFoundError`` where the interpreter has
    no library source or no ``pydoc_data``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    return list(_corpus(split, Path(sysconfig.get_path("stdlib"))))


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone."""
    digest = hashlib.sha256(f"{SALT}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _topics(split: Split) -> Iterator[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise FileNotFoundError("the built-in corpus needs pydoc_data.topics, which this Python lacks") from error
    for topic, text in sorted(topics.items()):
        name = f"topic:{topic}"
        if len(text) >= SHORTEST and split_of(name) == split:
            yield Document(name, text.strip() + "\n")


def _modules(stdlib: Path, split: Split) -> Iterator[Document]:
    if not (stdlib / "json" / "decoder.py").is_file():
        raise FileNotFoundError("the built-in corpus needs the library's source files, which this Python lacks")
    for path in _sources(stdlib):
        name = "module:" + ".".join(path.relative_to(stdlib).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if split_of(name) == split and len(text := _read(path)) >= SHORTEST:
            yield Document(name, text)


def _tests(stdlib: Path) -> Iterator[Document]:
    for path in sorted((stdlib / "test").rglob("test_*.py")):
        name = "module:" + ".".join(path.relative_to(stdlib).with_suffix("").parts)
        if split_of(name) == "train" and _draw(f"{name}/kept") < TESTS_KEPT:
            text = _read(path)
            if len(text) >= SHORTEST:
                yield Document(name, text[:TEST_CHARS])


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.stem in SKIPPED or path.stem.startswith("_sysconfigdata"):
            continue
        if path.is_dir() and path.name.isidentifier():
            yield from _sources(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _read(path: Path) -> str:
    """The text of a source file; empty where it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _pieces(document: Document) -> Iterator[Document]:
    """Cuts a document at blank lines into pieces of at most ``PIECE_CHARS``."""
    rest, index = document.text, 0
    while len(rest) > PIECE_CHARS:
        cut = rest.rfind("\n\n", PIECE_CHARS // 2, PIECE_CHARS) + 2
        cut = cut if cut > 1 else PIECE_CHARS
        yield Document(f"{document.name}#{index}", rest[:cut])
        rest, index = rest[cut:], index + 1
    if len(rest) >= SHORTEST:
        yield Document(f"{document.name}#{index}" if index else document.name, rest)
