"""Does preflight keep its word? Ten runs of different models and budgets: what --dry-run told and what happened.

python benchmarks/preflight.py [--threads 1] [--only pebble-4]
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from _harness import CALIBRATION_TEXT, MIB, MODEL, arguments, machine, table, work_folder, write
from _process import run
from _random_llama import build, narrow

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pebble-4": ("pebble", ("--bits", "4")),
    "pebble-size": ("pebble", ("--size", "4MB")),
    "pebble-gptq": ("pebble", ("--bits", "3", "--method", "gptq", "--uniform")),
    "pebble-own": ("pebble", ("--bits", "3.5", "--engine", "assay")),
    "builtin-4": ("builtin", ("--bits", "4")),
    "builtin-level": ("builtin", ("--level", "W4A16", "--engine", "vllm")),
    "builtin-size": ("builtin", ("--size", "5MB", "--tokens", "8192")),
    "llama-384x8": ("384x8", ("--bits", "4", "--tokens", "8192")),
    "llama-512x4": ("512x4", ("--bits", "3", "--tokens", "8192")),
    "llama-256x12": ("256x12", ("--size", "9MB", "--tokens", "8192")),
}  # fmt: skip


def cpu() -> float:
    """CPU seconds of the children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def model_of(name: str, work: Path) -> str:
    """A model's folder; random ones are made."""
    if name in ("pebble", "builtin"):
        return str(MODEL) if name == "pebble" else name
    folder = work / f"random-{name}"
    if not folder.exists():
        hidden, layers = map(int, name.split("x"))
        build(narrow(hidden, layers), folder, CALIBRATION_TEXT)
    return str(folder)


def both(name: str, work: Path, threads: int) -> dict[str, Any]:
    """One model and budget: what was told, what happened."""
    model, budget = RUNS[name]
    out = work / f"preflight-{name}"
    for folder in (out, out.with_name(f".{out.name}.assay")):
        shutil.rmtree(folder, ignore_errors=True)
    text = () if model == "builtin" else ("--calibration", str(CALIBRATION_TEXT))
    command = [sys.executable, "-m", "assay", "compress", model_of(model, work), *budget, *text, "-o", str(out), "--json"]
    command += ["--threads", str(threads)]
    seconds, answers, usages = [], [], []
    for more in (["--dry-run"], []):
        before = cpu()
        usage = run([*command, *more], threads, out.with_suffix(".log"))
        if usage.returncode:
            raise SystemExit(f"{name}: {usage.last_line}")
        seconds.append(cpu() - before)
        usages.append(usage)
        answers.append(json.loads(usage.output[usage.output.index("{\n") :]))
    told, done = answers
    shutil.rmtree(out)
    return {
        "name": name, "told_seconds": told["seconds"], "seconds": done["seconds"],
        "busy": seconds[0] / usages[0].seconds, "busy_run": seconds[1] / usages[1].seconds, "load": os.getloadavg()[0],
        "told_memory": told["memory"], "memory": usages[1].peak_rss_bytes, "told_bytes": told["bytes"], "bytes": done["bytes"],
        "told_disk": told["disk"], "rehearsal": told["rehearsal_seconds"],
    }  # fmt: skip


def line(row: dict[str, Any]) -> list[str]:
    """One line of the table. Time as CPU seconds is the promise and the run, each times its share of a core."""
    told, were = row["told_seconds"] * row["busy"], row["seconds"] * row["busy_run"]
    return [
        row["name"], f"{row['told_memory'] / MIB:.0f}", f"{row['memory'] / MIB:.0f}", ratio(row["told_memory"], row["memory"]),
        f"{row['told_seconds']:.0f}", f"{row['seconds']:.0f}", ratio(row["told_seconds"], row["seconds"]),
        f"{told:.0f}", f"{were:.0f}", ratio(told, were),
        f"{row['told_bytes']:,}", f"{row['bytes']:,}", f"{100 * (row['told_bytes'] / row['bytes'] - 1):+.3f}%",
        f"{row['rehearsal']:.0f}",
    ]  # fmt: skip


def ratio(told: float, done: float) -> str:
    """Told over done."""
    return f"{told / done:.2f}"


def main() -> None:
    """Measure what is asked for on the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    given = parser.parse_args()
    work, rows = work_folder(given.out), []
    header = ("run", "memory told, MiB", "was", "ratio", "seconds told", "were", "ratio", "CPU seconds told", "were", "ratio",
              "bytes told", "were",
              "off", "rehearsal, s")  # fmt: skip
    for name in given.only:
        rows.append(both(name, work, given.threads))
        write(work, "preflight", "\n\n".join([machine(given.threads), table(header, [line(row) for row in rows])]), rows)


if __name__ == "__main__":
    main()
