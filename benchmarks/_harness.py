"""What the benchmarks share: where things are, token windows, tables and where they are written."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ASSAY_SHARED", ROOT.parent / "shared"))
MODEL = SHARED / "models" / "pebble"
CALIBRATION_TEXT = SHARED / "data" / "wikitext2" / "valid.txt"
JUDGE_TEXT = SHARED / "data" / "wikitext2" / "test.txt"
WINDOW = 256
CALIBRATION_WINDOWS = 64
JUDGE_WINDOWS = 120
MIB = 1 << 20


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    return parser


def work_folder(folder: Path) -> Path:
    """Make a folder for results, hidden from git."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def token_windows(model: Path, text: Path, windows: int, length: int = WINDOW) -> Tensor:
    """First `windows` windows of `length` tokens of a text, int64 [windows, length].

    The whole text is tokenised at once, without special tokens; windows don't overlap.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < windows * length:
        raise ValueError(f"{text}: {len(ids)} tokens, {windows * length} needed")
    return torch.tensor(ids[: windows * length]).view(windows, length)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(threads: int) -> str:
    """Date, class of the machine and threads, one line."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [name for name, flag in (("AVX-512", "avx512f"), ("AMX", "amx_tile")) if flag in flags]
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores ({', '.join(units) or 'plain'}), "
        f"{threads} threads used, load {load:.1f} at the end; torch {torch.__version__}"
    )


def write(folder: Path, name: str, text: str, figures: Any) -> None:
    """Print a report and write it with its figures: `name`.md and `name`.json."""
    print(text)
    (folder / f"{name}.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
