"""What is lost at 4, 3 and 2 bits: ours beside the peers, in one run, from the same tokens.

python benchmarks/quality.py [--bits 4 3 2] [--only gptq hqq] [--threads 4]
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _contestants import OURS, RIVALS, Contestant, Task, chosen, compress
from _harness import (
    CALIBRATION_TEXT,
    CALIBRATION_WINDOWS,
    JUDGE_TEXT,
    JUDGE_WINDOWS,
    MIB,
    arguments,
    machine,
    table,
    token_windows,
    work_folder,
    write,
)
from evaluate import Judge, Judgement, ratio

Rows = dict[int, dict[Contestant, dict[str, Any]]]
HEADER = (
    "bits, contestant",
    "bits in blocks",
    "KL [95%]",
    "perplexity",
    "agreement",
    "seconds",
    "peak RSS MiB",
)


def measure(everyone: list[Contestant], task: Task, judge: Judge) -> dict[Contestant, dict[str, Any]]:
    """Compress with every contestant and judge it; adds `judgement` and its summary."""
    rows: dict[Contestant, dict[str, Any]] = {}
    for contestant in everyone:
        row = compress(contestant, task)
        if "failed" not in row:
            judgement = judge.judge(Path(row["folder"]))
            row |= {"judgement": judgement} | judgement.summary()
        print(f"{task.bits} bits, {contestant.name}: {row.get('failed') or row['kl']}", flush=True)
        rows[contestant] = row
    return rows


def figures(bits: int, contestant: Contestant, row: dict[str, Any]) -> list[str]:
    """One line of the first table."""
    name = f"{bits}, {contestant.name}"
    if "failed" in row:
        return [name, f"not run: {row['failed']}", *[""] * (len(HEADER) - 2)]
    return [
        name,
        f"{row['bits_in_blocks']:.3f}",
        f"{row['kl']:.5f} [{row['kl_low']:.5f}, {row['kl_high']:.5f}]",
        f"{row['perplexity']:.2f}",
        f"{row['agreement']:.1%}",
        f"{row['seconds']:.1f}",
        f"{row['peak_rss_bytes'] / MIB:.0f}",
    ]


def ratios(rows: Rows) -> Iterable[list[str]]:
    """Lines of the second table: each of ours by each peer."""
    for bits, found in rows.items():
        ran = {c: row for c, row in found.items() if "failed" not in row}
        for us, mine in ran.items():
            for peer, theirs in ran.items():
                if us.ours and not peer.ours:
                    yield [f"{bits}, {us.name}", peer.name, *_pair(mine, theirs)]


def _pair(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    value, low, high = ratio(mine["judgement"], theirs["judgement"])
    others = [mine[key] / theirs[key] for key in ("bits_in_blocks", "seconds", "peak_rss_bytes")]
    return [f"{value:.3f} [{low:.3f}, {high:.3f}]", *(f"{other:.2f}" for other in others)]


def report(rows: Rows, threads: int) -> str:
    """Both tables as markdown."""
    first = [figures(bits, c, row) for bits, found in rows.items() for c, row in found.items()]
    second = list(ratios(rows))
    parts = [machine(threads), table(HEADER, first)]
    if second:
        header = ("bits, ours", "peer", "KL, ours / peer [95%]", "bits", "seconds", "peak RSS")
        parts += ["Ratios, ours / peer (below 1: ours is smaller):", table(header, second)]
    return "\n\n".join(parts)


def main() -> None:
    """Compare on the model on the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64, help="of the peers; ours get the same bits in all")
    parser.add_argument("--only", nargs="+", help="parts of contestants' names")
    given = parser.parse_args()
    folder = work_folder(given.out)
    calibration = token_windows(given.model, CALIBRATION_TEXT, CALIBRATION_WINDOWS)
    judge = Judge(given.model, token_windows(given.model, JUDGE_TEXT, JUDGE_WINDOWS))
    everyone = chosen((*OURS, *RIVALS), given.only)
    rows: Rows = {}
    for bits in given.bits:
        task = Task(given.model, calibration, bits, given.threads, folder, given.group_size)
        rows[bits] = measure(everyone, task, judge)
        write(folder, "quality", report(rows, given.threads), _plain(rows))


def _plain(rows: Rows) -> list[dict[str, Any]]:
    """The figures without the arrays, for the JSON file."""
    return [
        {"contestant": c.name} | {k: v for k, v in row.items() if not isinstance(v, Judgement)}
        for found in rows.values()
        for c, row in found.items()
    ]


if __name__ == "__main__":
    main()
