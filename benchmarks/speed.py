"""Seconds to profile and compress to 4 bits: ours beside llm-compressor's GPTQ, and the floor.

python benchmarks/speed.py [--rounds 3] [--threads 4] [--windows 64 512] [--trellis]

(--windows: calibration, of 256 tokens each: as many as the other benchmarks take, and as llm-compressor does where none are
named; --trellis: only how fast a trellis is encoded)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from _contestants import PEER_GPTQ, Contestant, Task, compress, ours
from _floor import Part
from _harness import (
    CALIBRATION_TEXT,
    CALIBRATION_WINDOWS,
    WINDOW,
    arguments,
    machine,
    table,
    token_windows,
    work_folder,
    write,
)
from _process import run
from _viterbi import speeds

GPTQ, DEFAULT = ours("gptq", uniform=True), ours("auto", uniform=False)
EVERYONE = (GPTQ, DEFAULT, PEER_GPTQ)
PEERS_WINDOWS = 512
Times = dict[Contestant, list[dict[str, Any]]]


def rounds(task: Task, count: int) -> Times:
    """Every contestant in turn, `count` times."""
    times: Times = {contestant: [] for contestant in EVERYONE}
    for index in range(count):
        for contestant in EVERYONE:
            row = compress(contestant, task)
            if "failed" in row:
                raise SystemExit(f"{contestant.name}: {row['failed']}")
            times[contestant].append(row)
            print(f"round {index + 1}, {contestant.name}: {row['seconds']:.1f} s", flush=True)
    return times


def comparison(times: Times) -> str:
    """Medians, and the median ratio of the rounds to the peer, with its range."""
    rows = []
    for contestant, found in times.items():
        cells = [contestant.name]
        for key in ("seconds", "seconds_total", "wall_seconds"):
            pairs = zip(found, times[PEER_GPTQ], strict=True)
            ratios = [mine[key] / theirs[key] for mine, theirs in pairs]
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells += [f"{median(row[key] for row in found):.1f}", spread]
        rows.append(cells)
    header = ["contestant"]
    for name in ("work", "with imports and saving", "process"):
        header += [f"{name}, s", "ratio to the peer"]
    return table(header, rows)


def floor(model: Path, windows: int, threads: int, folder: Path) -> list[Part]:
    """The floor's parts, measured in a process with the contestants' environment."""
    script = Path(__file__).with_name("_floor.py")
    sizes = [str(n) for n in (windows, WINDOW, threads)]
    usage = run([sys.executable, str(script), str(model), *sizes], threads, folder / "floor.log")
    return [Part(**row) for row in json.loads(usage.output.strip().splitlines()[-1])]


def floors(parts: list[Part]) -> str:
    """The floor, part by part."""
    rows = [
        [
            part.name,
            "two-sided" if part.gradients else "all",
            f"{part.multiply_adds / 1e9:.1f}",
            f"{part.multiply_adds / part.seconds / 1e9:.0f}",
            f"{part.seconds:.2f}",
        ]
        for part in parts
    ]
    return table(("part", "needed by", "G multiply-adds", "G/s measured", "floor, s"), rows)


def distances(times: Times, parts: list[Part]) -> str:
    """How far ours is from the floor."""
    columns = sum(part.seconds for part in parts if not part.gradients)
    both = sum(part.seconds for part in parts)
    rows = []
    for contestant, least, what in (
        (GPTQ, columns, "inputs only"),
        (DEFAULT, both, "with gradients"),
    ):
        took = median(row["seconds"] for row in times[contestant])
        rows.append([contestant.name, what, f"{least:.2f}", f"{took / least:.1f}"])
    return table(("contestant", "floor of", "floor, s", "median / floor"), rows)


def encoding() -> str:
    """How fast a trellis is encoded on one core."""
    rows = [[f"{s.bits:g}", s.name, f"{s.weights_a_second:,.0f}", "" if s.error is None else f"{s.error:.4f}"] for s in speeds()]
    return table(("bits", "trellis of 4,096 states", "weights a second and core", "error on a unit Gaussian"), rows)


def main() -> None:
    """Time ours and the peer on the model on the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[CALIBRATION_WINDOWS, PEERS_WINDOWS], help="calibration windows of 256 tokens"
    )
    parser.add_argument("--trellis", action="store_true", help="only how fast a trellis is encoded")
    given = parser.parse_args()
    if given.trellis:
        print(encoding())
        return
    folder = work_folder(given.out)
    text, figures = [machine(given.threads)], {}
    for windows in given.windows:
        ids = token_windows(given.model, CALIBRATION_TEXT, windows)
        times = rounds(Task(given.model, ids, given.bits, given.threads, folder), given.rounds)
        parts = floor(given.model, windows, given.threads, folder)
        text += [f"{windows * WINDOW:,} calibration tokens:", comparison(times), floors(parts), distances(times, parts)]
        figures[windows] = {c.name: rows for c, rows in times.items()} | {"floor": [vars(p) for p in parts]}
    write(folder, "speed", "\n\n".join([*text, encoding()]), figures)


if __name__ == "__main__":
    main()
