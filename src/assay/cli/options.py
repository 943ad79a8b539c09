"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from assay.cli import completion
from assay.model.errors import InputError


class ProgressKind(str, Enum):
    """How progress is shown: bars for people, lines for programs."""

    bars = "bars"
    lines = "lines"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id like org/name, or builtin.", show_default=False)]
Size = Annotated[str | None, typer.Option("--size", metavar="SIZE", help="Bound on the bytes of all weight files, like 3.5GB.")]
Bits = Annotated[
    float | None,
    typer.Option("--bits", metavar="BITS", help="Bound on the average bits of the weights in the blocks, all overhead counted."),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Bound on the memory of serving, like 22GB; needs --context.")
]
Context = Annotated[
    str | None, typer.Option("--context", metavar="N", help="Tokens that a sequence may have, like 8192 or 32k (k is 1024).")
]
Batch = Annotated[int | None, typer.Option("--batch", metavar="N", help="Sequences served at once; 1 if not given.")]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="TYPE|auto", help="How keys and values are stored, like fp8; auto divides --memory over both."
    ),
]
Evict = Annotated[
    str | None, typer.Option("--evict", metavar="NAME", help="Let the plan drop tokens: snapkv or streaming_llm; loses facts.")
]
Latency = Annotated[float | None, typer.Option("--latency", metavar="MS", help="Bound on the time of one token; needs --speeds.")]
TokensPerSecond = Annotated[
    float | None, typer.Option("--tokens-per-second", metavar="N", help="The same as a rate; needs --speeds.")
]
Speeds = Annotated[Path | None, typer.Option("--speeds", metavar="FILE", help="What assay benchmark wrote on this machine.")]
MaxLoss = Annotated[
    float | None, typer.Option("--max-loss", metavar="NATS", help="Bound on the KL to the original, in nats per token.")
]
Level = Annotated[
    str | None,
    typer.Option("--level", metavar="LEVEL", help="One level everywhere: a preset like W4A16 or NF4, or like int4-g64-asym."),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="A name that assay methods lists, auto (quick) or best.",
        autocompletion=completion.methods,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine", metavar="NAME", help="What will run it: transformers, vllm, llama.cpp, assay or plain.",
        autocompletion=completion.engines,
    ),
]  # fmt: skip
Planner = Annotated[
    str,
    typer.Option(
        "--planner", metavar="NAME", help="How a budget is divided; evolution measures plans.", autocompletion=completion.planners
    ),
]
Keep = Annotated[
    list[str] | None, typer.Option("--keep", metavar="PATTERN", help="Leave matching tensors as they are; may be repeated.")
]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="FILE|DATASET", help="Text, JSONL or a hub data set; the built-in text if not given."),
]
Tokens = Annotated[
    str | None, typer.Option("--tokens", metavar="N|auto", help="Calibration tokens; auto adds more until the plan stays.")
]
Window = Annotated[int | None, typer.Option("--window", metavar="N", help="Tokens that are read together.", min=2)]
Uniform = Annotated[bool, typer.Option("--uniform", help="One level everywhere instead of the best mix.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write; must not exist yet.")]
Shown = Annotated[
    ProgressKind, typer.Option("--progress", help="On stderr: bars on a terminal, or lines of JSON for another program.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def token_count(text: str | None) -> int | str | None:
    """The value of `--tokens`. Raises InputError."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"--tokens {text}: give a number above zero, or auto")
    return int(text)


def absent(path: Path) -> Path:
    """A path where something new may be written. Raises InputError."""
    if path.exists():
        raise InputError(f"{path} exists; choose another name or remove it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} does not exist; make it first")
    return path
