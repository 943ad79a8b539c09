"""Cache policies: recall and KL against memory kept, beside kvpress. Time and memory: cache_speed.py.

python benchmarks/cache.py [--texts 12] [--trials 32] [--rows FILE]

Rows are appended to FILE as they are measured, and rows that are there are not measured again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import _cache_tasks as tasks_of
import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, ROOT, arguments, machine, table, token_windows, work_folder, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import assay

SHARES = (0.5, 0.25, 0.12)
SEEDS = 5
EVICTORS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "streaming_llm": (("streaming_llm",), {}), "h2o": (("h2o",), {}), "scissorhands": (("scissorhands",), {}),
    "keyformer": (("keyformer",), {}), "snapkv": (("snapkv",), {}), "pyramid": (("snapkv",), {"shape": "pyramid"}),
    "prefixkv": (("prefixkv",), {}),
    "streaming_llm, generated stay": (("streaming_llm",), {"grows": True}), "h2o, generated stay": (("h2o",), {"grows": True}),
    "snapkv, prefix budgets": (("snapkv",), {"shape": "prefix"}),
    "snapkv, planned budgets": (("snapkv",), {"shape": "planned"}),
}  # fmt: skip
STORED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fp8": (("fp8",), {}), "kivi 4": (("kivi",), {"bits": 4}), "kivi 2": (("kivi",), {"bits": 2}),
    "block_float 4": (("block_float",), {}), "block_float 4, unsorted": (("block_float",), {"ordered": False}),
    "fireq 4": (("fireq",), {}), "think 0.4": (("think",), {"thin": 0.4}), "cskv 0.5": (("cskv",), {"density": 0.5}),
    "cskv 0.25": (("cskv",), {"density": 0.25}), "cskv 0.5 in 4 bits": (("cskv",), {"density": 0.5, "bits": 4}),
    "snapkv 0.5 + kivi 4": (("snapkv", "kivi"), {"budget": 0.5, "bits": 4}),
    "snapkv 0.5 + think 0.4 + kivi 4": (("snapkv", "think", "kivi"), {"budget": 0.5, "bits": 4, "thin": 0.4}),
    "double_sparsity, 1/4 read": (("double_sparsity",), {"read": 0.25}),
    "double_sparsity, 1/16 read": (("double_sparsity",), {"read": 1 / 16}),
}  # fmt: skip


class Rows:
    """Measured rows in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row unless it is there."""
        if not self.found(**key):
            self.put(key | measure())

    def put(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")

    def found(self, **key: Any) -> list[dict[str, Any]]:
        """Rows that have these values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in key.items())]


def quality(rows: Rows, model_folder: Path, sizes: tuple[int, int]) -> None:
    """KL and recall of every policy of ours."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tasks = tasks_of.make(tokenizer, JUDGE_TEXT, *sizes)
    calibration = token_windows(model_folder, CALIBRATION_TEXT, 16)
    dense, full = tasks_of.continued(
        model, tasks, nullcontext, True, lambda _, cache: sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    )

    def measured(names: tuple[str, ...], options: dict[str, Any], looks: bool = True) -> dict[str, Any]:
        def enter() -> Any:
            return assay.attach(model, *names, calibration=calibration, **options)

        logits, nbytes = tasks_of.continued(model, tasks, enter, True, lambda held, _: held.nbytes)
        found = {"bytes": nbytes / full, "kl": tasks_of.divergence(dense, logits)}
        if looks:
            for word, known in (("known", True), ("later", False)):
                found[word] = tasks_of.recall(model, tokenizer, tasks, enter, True, known)
        return found

    rows.add({"who": "dense", "policy": "dense"}, lambda: {
        "bytes": 1.0, "kl": 0.0, **{word: tasks_of.recall(model, tokenizer, tasks, nullcontext, True, known)
                                    for word, known in (("known", True), ("later", False))}})  # fmt: skip
    for share in SHARES:
        for name, (names, options) in EVICTORS.items():
            rows.add(
                {"who": "ours", "policy": name, "share": share},
                lambda n=names, o=options, s=share: measured(n, o | {"budget": s}),
            )
        for seed in range(SEEDS):
            rows.add({"who": "ours", "policy": "random", "share": share, "seed": seed},
                     lambda s=share, d=seed: measured(("random",), {"budget": s, "seed": d}, d == 0))  # fmt: skip
    for name, (names, options) in STORED.items():
        rows.add({"who": "ours", "policy": name, "share": None}, lambda n=names, o=options: measured(n, o))


def peers(rows: Rows, model_folder: Path, sizes: tuple[int, int]) -> None:
    """kvpress in its own environment."""
    python = Path(os.environ.get("ASSAY_PEERS", ROOT / ".peers")) / "kv" / "bin" / "python"
    if rows.found(who="kvpress") or not python.exists():
        return
    script = ROOT / "benchmarks" / "peers" / "kvpress_peer.py"
    command = [python, script, "--model", model_folder, "--text", JUDGE_TEXT, "--sizes", *sizes, "--shares", *SHARES]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            rows.put(json.loads(line))


def report(rows: Rows) -> str:
    """The tables."""
    lines = []
    for share in SHARES:
        for row in rows.found(share=share):
            if row["policy"] != "random" or row.get("seed", 0) == 0:
                seeds = rows.found(who=row["who"], policy=row["policy"], share=share)
                kl = mean(r["kl"] for r in seeds)
                lines.append([f"{share:.0%}", row["policy"], row["who"], f"{row['bytes']:.3f}", f"{kl:.4f}",
                              f"{row['known']:.0%}", f"{row['later']:.0%}"])  # fmt: skip
    lines.sort(key=lambda x: (-float(x[0][:-1]), float(x[4])))
    head = ("kept", "policy", "whose", "bytes / dense", "KL, nats", "recall, question in the prompt", "recall, question later")
    stored = [[r["policy"], f"{r['bytes']:.3f}", f"{r['kl']:.5f}", f"{r['known']:.0%}", f"{r['later']:.0%}"]
              for r in sorted(rows.found(who="ours", share=None), key=lambda r: r["kl"])]  # fmt: skip
    return "\n\n".join((
        table(head, lines), table(("stored smaller", "bytes / dense", *head[4:]), stored),
    ))  # fmt: skip


def main() -> None:
    """Measure what is missing, and report."""
    parser = arguments(__doc__)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--rows", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = work_folder(given.out)
    rows = Rows(given.rows or folder / "cache.jsonl")
    sizes = (given.texts, given.trials)
    quality(rows, given.model, sizes)
    peers(rows, given.model, sizes)
    write(folder, "cache", f"{machine(given.threads)}\n\n{report(rows)}", rows.rows)


if __name__ == "__main__":
    main()
