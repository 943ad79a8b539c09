"""Kills `assay compress` at random moments and resumes it; the result must not differ by a bit.

python benchmarks/resume.py [--kills 20] [--seed 0] [--threads 4]
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _harness import arguments, machine, table, work_folder, write
from _process import start


def command(given: Any, out: Path) -> list[str]:
    """The call that is made again after every kill."""
    return [
        *(sys.executable, "-m", "assay", "compress", str(given.model), "--bits", given.bits),
        *("-o", str(out), "--threads", str(given.threads)),
    ]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a result, by its path inside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def clear(out: Path) -> None:
    """Remove a result and whatever unfinished work lies beside it."""
    for path in (out, *out.parent.glob(f".{out.name}.*")):
        shutil.rmtree(path, ignore_errors=True)


def finish(given: Any, out: Path) -> tuple[float, dict[str, str]]:
    """Run to the end: seconds and the hashes of the result."""
    began = time.perf_counter()
    log = out.with_suffix(".log")
    if start(command(given, out), given.threads, log).wait():
        raise SystemExit(f"assay compress failed: {log.read_text(errors='replace')[-500:]}")
    return time.perf_counter() - began, hashes(out)


def killed(given: Any, out: Path, moment: float) -> bool:
    """Run until `moment` seconds have passed and kill it; False if it ended before."""
    process = start(command(given, out), given.threads, out.with_suffix(".log"))
    try:
        code = process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    if code:
        log = out.with_suffix(".log").read_text(errors="replace")
        raise SystemExit(f"assay compress failed on resuming: {log[-500:]}")
    return False


def trial(given: Any, out: Path, longest: float, kills: int, chance: random.Random) -> list[float]:
    """Start anew; kill and resume until the result is there or `kills` are spent.

    Returns the moments of the kills, seconds after each start.
    """
    clear(out)
    moments: list[float] = []
    unfinished = out.with_name(f".{out.name}.assay")
    while len(moments) < kills and (unfinished.exists() or not out.exists()):
        moment = chance.uniform(0, longest)
        if not killed(given, out, moment):
            break
        moments.append(moment)
    return moments


def main() -> None:
    """Run trials until the asked number of kills is reached. Exits with 1 if any result differs."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", default="4")
    given = parser.parse_args()
    folder = work_folder(given.out)
    out, chance = folder / "resumed", random.Random(given.seed)
    clear(folder / "undisturbed")
    seconds, expected = finish(given, folder / "undisturbed")
    rows: list[dict[str, Any]] = []
    while (left := given.kills - sum(len(row["kills"]) for row in rows)) > 0:
        kills = trial(given, out, seconds, left, chance)
        done = out.exists() and not out.with_name(f".{out.name}.assay").exists()
        found = hashes(out) if done else finish(given, out)[1]
        differing = [f for f in expected | found if expected.get(f) != found.get(f)]
        rows.append({"kills": kills, "differing": differing})
    report(given, folder, seconds, rows, len(expected))
    sys.exit(any(row["differing"] for row in rows))


def report(given: Any, folder: Path, seconds: float, rows: list[dict[str, Any]], files: int) -> None:
    """Write the table, one line a trial."""
    lines = [
        [
            index + 1,
            ", ".join(f"{moment:.1f}" for moment in row["kills"]) or "none",
            ", ".join(row["differing"]) or f"none of {files}",
        ]
        for index, row in enumerate(rows)
    ]
    header = ("trial", "killed, seconds after each start", "files that differ")
    note = f"Undisturbed: {seconds:.1f} s. Every kill is SIGKILL to the whole process group."
    parts = [machine(given.threads), note, table(header, lines)]
    write(folder, "resume", "\n\n".join(parts), rows)


if __name__ == "__main__":
    main()
