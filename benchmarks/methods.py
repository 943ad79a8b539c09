"""Every weight method at 4, 3 and 2 real bits, and whether each beats the baseline that its card names.

python benchmarks/methods.py [--model builtin] [--only gptq trellis] [--bits 4 3] [--seeds 3]
python benchmarks/methods.py --report     (the tables again, from the figures of the last run)
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from _claims import CLAIMS, ELSEWHERE, Claim
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL, ROOT, machine, table, work_folder, write

import assay
from assay.builtin.corpus import corpus
from assay.methods import base
from assay.model.errors import AssayError
from assay.model.level import Level

OVERHEAD = 0.3
NUMBER_FORMATS = ("nf4-g64", "fp4-g64", "mxfp4-g32", "nvfp4-g16", "int4-g128-sym", "fp8-channel")
FORMAT_METHODS = ("gptq", "two_sided")
TITLES = {"formats": "Number formats", "claims": "Further rows that the claims need"}


class Trial(NamedTuple):
    """One compression of all blocks at one level."""

    method: str
    level: str

    @classmethod
    def of(cls, text: str) -> Trial:
        """From "method level"."""
        return cls(*text.split())


Row = dict[str, Any]
Rows = dict[Trial, list[Row]]


def levels(model: str, method: str, bits: Sequence[int]) -> dict[int, str]:
    """Of the levels that a method offers to every matrix, the one nearest to each width, all bytes counted."""
    sites = [r for r in assay.inspect(model)["sites"] if r["block"] is not None]
    shapes = [(*r["shape"], r["bytes"] // math.prod(r["shape"])) for r in sites]
    menu = set.intersection(*(set(base.get(method)().levels(columns)) for _, columns, _ in shapes))
    weights = sum(math.prod(r["shape"]) for r in sites)
    real = {x: 8 * sum(x.nbytes(*shape) for shape in shapes) / weights for x in menu}
    return {b: min(sorted(real), key=lambda x: abs(real[x] - b - OVERHEAD)).name for b in bits}


def trials(model: str, methods: Sequence[str], bits: Sequence[int]) -> dict[str, list[Trial]]:
    """What is run on a model: width or "formats" -> trials; "claims" has those that only the claims need."""
    menus = {m: levels(model, m, bits) for m in methods}
    found = {str(b): [Trial(m, menus[m][b]) for m in methods] for b in bits}
    found["formats"] = [Trial(m, x) for x in NUMBER_FORMATS for m in FORMAT_METHODS if m in methods]
    sides = [Trial.of(side) for c in CLAIMS if c.method in methods for b in c.widths if b in bits for side in c.sides(b)]
    found["claims"] = [t for t in dict.fromkeys(sides) if not any(t in rows for rows in found.values())]
    return found


def calibration(model: str, seed: int, folder: Path) -> Path | None:
    """The text to calibrate on: the usual one, for other seeds another part of it."""
    if seed == 0:
        return None if model == "builtin" else CALIBRATION_TEXT
    text = "\n".join(d.text for d in corpus("calibration")) if model == "builtin" else CALIBRATION_TEXT.read_text()
    start = int(len(text) * (seed * 0.618 % 1) * 0.8)
    path = folder / f"text{seed}.txt"
    path.write_text(text[start:])
    return path


def measure(model: str, planned: Sequence[Trial], seed: int, given: argparse.Namespace) -> Iterable[tuple[Trial, Row]]:
    """Profile once, then compress and judge each trial."""
    judge = None if model == "builtin" else JUDGE_TEXT
    weightwise = sorted({t.method for t in planned if base.weightwise(t.method)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assay.profile(
            model, folder / "profile", calibration=calibration(model, seed, folder), tokens=given.tokens, seed=seed,
            methods=weightwise or ("gptq",), levels=sorted({Level.parse(t.level).base.name for t in planned}),
        )  # fmt: skip
        for i, trial in enumerate(planned):
            out = folder / f"trial{i}"
            try:
                done = assay.compress(model, out, profile=folder / "profile", level=trial.level, method=trial.method,
                                      engine="assay", threads=given.threads, sequential=given.sequential)  # fmt: skip
                verdict = assay.verify(out, model, text=judge, tokens=given.judge_tokens)
            except AssayError as error:
                yield trial, {"failed": str(error)}
                continue
            finally:
                shutil.rmtree(out, ignore_errors=True)
            kl = verdict["kl"]
            yield trial, {
                "bits": verdict["bits"], "kl": kl["measured"], "low": kl["low"], "high": kl["high"],
                "perplexity": verdict["perplexity"]["compressed"], "original": verdict["perplexity"]["original"],
                "seconds": done["seconds"],
            }  # fmt: skip


def kl_of(runs: Sequence[Row]) -> float:
    """Mean KL over the seeds; infinite where one failed."""
    return mean(r.get("kl", math.inf) for r in runs)


def method_table(run: Sequence[Trial], rows: Rows, seeds: int) -> str:
    """Least KL first. The interval holds those of all seeds."""
    header = ["method", "level", "real bits", "KL [95%]", "perplexity", "seconds"]
    header[4:4] = [f"range of {seeds} seeds"] if seeds > 1 else []
    return table(header, (_cells(t, rows[t], seeds) for t in sorted(run, key=lambda t: kl_of(rows[t]))))


def _cells(trial: Trial, runs: Sequence[Row], seeds: int) -> list[str]:
    first = next((r for r in runs if "failed" in r), runs[0])
    if "failed" in first:
        return [*trial, f"not run: {first['failed']}", *[""] * (3 + (seeds > 1))]
    kls = [r["kl"] for r in runs]
    spread = [f"{min(kls):.5f} to {max(kls):.5f}" if len(runs) > 1 else "one seed"] if seeds > 1 else []
    kl = f"{kl_of(runs):.5f} [{min(r['low'] for r in runs):.5f}, {max(r['high'] for r in runs):.5f}]"
    perplexity, seconds = mean(r["perplexity"] for r in runs), median(r["seconds"] for r in runs)
    return [*trial, f"{first['bits']:.3f}", kl, *spread, f"{perplexity:.2f}", f"{seconds:.1f}"]


def verdict(claim: Claim, bits: int, rows: Rows) -> tuple[str, str]:
    """(yes, no or not measured; the two KLs) of a claim at a width."""
    better, worse = (rows.get(Trial.of(side), []) for side in claim.sides(bits))
    shared = min(len(better), len(worse))
    better, worse = better[:shared], worse[:shared]
    if not better or not worse or math.inf in (kl_of(better), kl_of(worse)):
        return "not measured", ""
    held = kl_of(better) < claim.factor * kl_of(worse)
    overlap = better[0]["high"] >= worse[0]["low"] and worse[0]["high"] >= better[0]["low"]
    return "yes" if held else "no", f"{kl_of(better):.5f} / {kl_of(worse):.5f}" + (", intervals overlap" if overlap else "")


def claim_table(found: Mapping[str, Rows], bits: Sequence[int]) -> str:
    """Each claim at each width on each model, and the claims that only tests check."""
    lines = []
    measured = {trial.method for rows in found.values() for trial in rows}
    for claim in (c for c in CLAIMS if c.method in measured):
        for b in (b for b in claim.widths if b in bits):
            verdicts = {model: verdict(claim, b, rows) for model, rows in found.items()}
            held = "; ".join(f"{model}: {word}" for model, (word, _) in verdicts.items())
            numbers = "; ".join(f"{model}: {text}" for model, (_, text) in verdicts.items() if text)
            why = claim.why if any(word == "no" for word, _ in verdicts.values()) else ""
            lines.append([claim.method, f"{claim.says}: {' < '.join(claim.compared(b))}", held, numbers, why])
    lines += [[method, says, "not measured here", "", why] for method, says, why in ELSEWHERE]
    return table(("method", "claim", "held", "KLs", "reason if not"), lines)


def report(figures: Mapping[str, Any]) -> str:
    """All tables as markdown, from what the JSON file holds."""
    seeds, bits = figures["seeds"], figures["bits"]
    parts, found = [figures["machine"], figures["settings"]], {}
    for model, part in figures["models"].items():
        rows = found[model] = {Trial.of(name): runs for name, runs in part["rows"].items()}
        original = next((r["original"] for runs in rows.values() for r in runs if "original" in r), math.nan)
        parts.append(f"## {model} (perplexity of the original {original:.2f})")
        for name, planned in part["trials"].items():
            if run := [t for t in map(Trial.of, planned) if t in rows]:
                parts += [
                    f"### {TITLES.get(name, f'About {name} bits')}",
                    method_table(run, rows, seeds if name.isdecimal() else 1),
                ]
    return "\n\n".join([*parts, "## Claims", claim_table(found, bits)])


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[str(MODEL), "builtin"], help="checkpoint folders, or builtin")
    parser.add_argument("--only", nargs="+", help="methods")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tokens", type=int, default=8192, help="of the calibration text")
    parser.add_argument("--judge-tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=1, help="how many calibration texts; formats and claims have one")
    parser.add_argument("--sequential", action="store_true", help="compress in the order of the model")
    parser.add_argument("--widths-only", action="store_true", help="no number formats, and nothing for the claims alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    return parser.parse_args()


def main() -> None:
    """Measure, and write after every trial what is known."""
    given = options()
    folder = work_folder(given.out)
    if given.report:
        figures = json.loads((folder / "methods.json").read_text())
        return write(folder, "methods", report(figures), figures)
    torch.set_num_threads(given.threads)
    figures = {"seeds": given.seeds, "bits": given.bits, "machine": "", "models": {}}
    figures["settings"] = (
        f"{given.seeds} calibration seeds of {given.tokens} tokens; judged on {given.judge_tokens} tokens; windows of 256"
        f"{'; sequential' if given.sequential else ''}"
    )
    for model in given.model:
        planned = trials(model, given.only or base.names(), given.bits)
        planned = {k: [] if given.widths_only and not k.isdecimal() else v for k, v in planned.items()}
        part: dict[str, Any] = {"trials": {k: [" ".join(t) for t in v] for k, v in planned.items()}, "rows": {}}
        figures["models"][Path(model).name] = part
        for seed in range(given.seeds):
            wanted = [k for k in planned if seed == 0 or k.isdecimal()]
            for trial, row in measure(model, list(dict.fromkeys(chain(*(planned[k] for k in wanted)))), seed, given):
                part["rows"].setdefault(" ".join(trial), []).append(row)
                print(Path(model).name, seed, *trial, row, flush=True)
                figures["machine"] = machine(given.threads)
                (folder / "methods.json").write_text(json.dumps(figures))
    write(folder, "methods", report(figures), figures)


if __name__ == "__main__":
    main()
