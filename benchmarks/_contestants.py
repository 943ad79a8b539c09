"""Ours and the peers as commands that compress one model and leave a plain checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _harness import CALIBRATION_TEXT, ROOT
from _process import run
from torch import Tensor

PEERS = Path(os.environ.get("ASSAY_PEERS", ROOT / ".peers"))
SCRIPTS = Path(__file__).parent / "peers"
GROUP_SIZE = 64


@dataclass(frozen=True)
class Contestant:
    """A script in peers/, the virtual environment it runs in (None: this one), its own options."""

    name: str
    script: str
    home: str | None = None
    options: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether this is assay and not a peer."""
        return self.script == "ours.py"

    @property
    def python(self) -> Path:
        """The interpreter it runs under."""
        return PEERS / self.home / "bin" / "python" if self.home else Path(sys.executable)


@dataclass(frozen=True)
class Task:
    """One thing that every contestant gets: model, ids int64 [windows, length], bits, threads, group size of the peers."""

    model: Path
    ids: Tensor
    bits: int
    threads: int
    folder: Path
    group_size: int = GROUP_SIZE


def llama_cpp(family: str) -> Contestant:
    """llama.cpp's own quantizer, k-quants or i-quants; it lives in our environment."""
    options = ("--family", family, "--text", str(CALIBRATION_TEXT))
    return Contestant(f"llama.cpp {family}-quants", "llama_cpp_peer.py", options=options)


PEER_GPTQ = Contestant("llm-compressor GPTQ", "llm_compressor_gptq.py", "llmc")
RIVALS = (
    PEER_GPTQ,
    Contestant("llm-compressor AWQ", "llm_compressor_awq.py", "llmc"),
    Contestant("auto-round, 200 steps", "auto_round_peer.py", "ar"),
    Contestant("HQQ", "hqq_peer.py", "misc"),
    Contestant("quanto", "quanto_peer.py", "misc"),
    llama_cpp("k"),
    llama_cpp("i"),
)


def ours(method: str, uniform: bool, sequential: bool = False) -> Contestant:
    """Assay with one method: one width everywhere, or a mixed plan of the same total bits; at once or in the model's order."""
    plan = "uniform" if uniform else "mixed"
    options = ("--method", method, "--plan", plan, "--text", str(CALIBRATION_TEXT))
    name = f"assay {method}, {plan}"
    if sequential:
        name, options = f"{name}, in order", (*options, "--sequential")
    return Contestant(name, "ours.py", options=options)


BEST = ours("best", uniform=False)
IN_ORDER = ours("best", uniform=False, sequential=True)
METHODS = ("gptq", "two_sided", "admm")
OURS = (*(ours(method, uniform) for uniform in (True, False) for method in METHODS), BEST, IN_ORDER)


def chosen(everyone: Iterable[Contestant], words: list[str] | None) -> list[Contestant]:
    """Those whose name holds one of the words, or all."""
    if not words:
        return list(everyone)
    return [c for c in everyone if any(word.lower() in c.name.lower() for word in words)]


def compress(contestant: Contestant, task: Task) -> dict[str, Any]:
    """Run one contestant in a fresh process.

    Returns its `result.json` with `folder` (the plain checkpoint), `wall_seconds` and
    `tree_rss_bytes` as seen from outside, or {"failed": why}.
    """
    label = "".join(c if c.isalnum() else "-" for c in contestant.name)
    target = task.folder / f"{label}-{task.bits}"
    shutil.rmtree(target, ignore_errors=True)
    if not contestant.python.exists():
        return {"failed": f"no environment {contestant.home}: run benchmarks/peers/setup.sh"}
    calibration = task.folder / "calibration.npy"
    np.save(calibration, task.ids.numpy())
    given = {
        "model": task.model,
        "calibration": calibration,
        "bits": task.bits,
        "group-size": task.group_size,
        "out": target,
        "threads": task.threads,
    }
    command = [str(contestant.python), str(SCRIPTS / contestant.script)]
    command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
    usage = run([*command, *contestant.options], task.threads, target.with_suffix(".log"))
    result = target / "result.json"
    if usage.returncode or not result.exists():
        return {"failed": usage.last_line or f"exit {usage.returncode}"}
    outside = {"wall_seconds": usage.seconds, "tree_rss_bytes": usage.peak_rss_bytes}
    return json.loads(result.read_text()) | outside | {"folder": str(target)}
