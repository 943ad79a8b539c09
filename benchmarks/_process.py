"""Runs a command and watches the time and the memory of it and its children."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _harness import ROOT

SAMPLE_SECONDS = 0.02
FIELDS = ("VmHWM", "VmRSS", "RssAnon")


@dataclass(frozen=True)
class Usage:
    """What a command cost.

    seconds: wall time. peak_rss_bytes: most resident memory of the whole tree, mapped files
    included: the larger of one process's own high-water mark and the largest sampled sum.
    peak_anonymous_bytes: largest sampled sum without mapped files, which the kernel may drop.
    """

    returncode: int
    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    output: str

    @property
    def last_line(self) -> str:
        """Last line the command printed, cut to 100 characters."""
        lines = self.output.strip().splitlines()
        return lines[-1].strip()[:100] if lines else ""


def environment(threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a command: its threads, this repository's source, no network."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }
    return os.environ | fixed | dict(extra or {})


def start(command: Sequence[str], threads: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; what it prints goes to a file."""
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment(threads), stdout=file, stderr=file, start_new_session=True)


def run(command: Sequence[str], threads: int, log: Path) -> Usage:
    """Run a command to its end."""
    began = time.perf_counter()
    process = start(command, threads, log)
    resident = anonymous = 0
    try:
        while process.poll() is None:
            samples = [_memory(pid) for pid in _tree(process.pid)]
            own = max((s["VmHWM"] for s in samples), default=0)
            resident = max(resident, own, sum(s["VmRSS"] for s in samples))
            anonymous = max(anonymous, sum(s["RssAnon"] for s in samples))
            time.sleep(SAMPLE_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    seconds = time.perf_counter() - began
    output = log.read_text(errors="replace")
    return Usage(process.returncode, seconds, resident, anonymous, output)


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            waiting += [int(child) for child in _read(task).split()]
    return found


def _memory(pid: int) -> dict[str, int]:
    """Memory figures of one process in bytes; zeros once it is gone."""
    status = _read(Path(f"/proc/{pid}/status"))
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE))
    return {field: 1024 * int(kilobytes.get(field, 0)) for field in FIELDS}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
