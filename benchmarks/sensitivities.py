"""Sensitivities side by side

How well each knows what rounding one matrix costs, and the plan that it leads to:

    PYTHONPATH=src python benchmarks/sensitivities.py

Each ranks the matrices of a model from one profile. Reported: Spearman's correlation with leave-one-out KL, seconds on
top of the profile, and the KL on other text of the plan of at most 3.30 bits that it leads to, all matrices rounded to nearest
(groups of 64). A price is divided among 2 to 6 bits by Lagrange; an order gives its first matrices 4 bits and the
others 2, as many as fit. Beside them 3 bits everywhere, which fills that budget.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL, arguments, machine, table, work_folder, write

import assay
from assay.budget import planners, sensitivity
from assay.budget.menu import Decision, Option
from assay.budget.probe import nearest
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows, windows
from assay.methods.grid.trellis import distortion
from assay.model.level import Level
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare
from assay.run import open_model

LEVELS = [Level(bits, 64, False) for bits in (2, 3, 4, 5, 6)]
BUDGET = 3.30
TOKENS = 16_384
JUDGED = 12_288
TRUTH = "leave_one_out"


def divided(ranking: sensitivity.Ranking) -> dict[str, Level]:
    """The level of every matrix within `BUDGET` bits."""
    limit = int(BUDGET * sum(row.count for row in ranking.rows) / 8)
    sizes = {row.site: {x.bits: _nbytes(row.count, x) for x in LEVELS} for row in ranking.rows}
    if not ranking.prices:
        spent, found = sum(s[2] for s in sizes.values()), {}
        for row in ranking.rows:
            more = sizes[row.site][4] - sizes[row.site][2]
            fits = spent + more <= limit
            spent += more if fits else 0
            found[row.site] = LEVELS[2 if fits else 0]
        return found
    unit = distortion(ranking.bits)
    decisions = [
        Decision(row.site, (row.site,), row.count, True, tuple(
            Option(x.name, sizes[row.site][x.bits], max(row.score, 1e-12) * distortion(x.bits) / unit) for x in LEVELS
        )) for row in ranking.rows
    ]  # fmt: skip
    choice = planners.get("lagrange").plan(decisions, limit)
    return {d.name: Level.parse(str(d.options[c].level)) for d, c in zip(decisions, choice, strict=True)}


def _nbytes(count: int, level: Level) -> int:
    """Codes, a scale of 16 bits and a zero point of as many bits as a code for every 64 weights."""
    return int(count * (level.bits + (16 + level.bits) / 64) / 8)


def figures(model: str | Path, calibration: Path | None, judge: Path | None, folder: Path) -> list[dict[str, Any]]:
    """A row for each sensitivity, and one for 3 bits everywhere."""
    streamed = StreamedModel(open_model(model))
    profile = assay.profile(model, folder, calibration=calibration, tokens=TOKENS, methods=("gptq", "squeezellm"))
    rankings = [sensitivity.rank(Profile.open(folder), name, streamed, Silent()) for name in sensitivity.names()]
    plans = {r.name: divided(r) for r in rankings} | {"3 bits": {row.site: LEVELS[1] for row in rankings[0].rows}}
    text = windows(streamed.checkpoint, judge, "evaluation", JUDGED, profile.index["calibration"]["window"], streamed.vocabulary)
    candidates = {n: Candidate(streamed, nearest(lambda s, p=p: p.get(s.name))) for n, p in plans.items()}
    scores = compare(streamed, candidates, Windows(text.ids, text.source), Silent())
    correlations, seconds = sensitivity.correlations(rankings)[TRUTH], {r.name: r.seconds for r in rankings}
    sizes = {row.site: row.count for row in rankings[0].rows}
    return [
        {"name": name, "correlation": correlations.get(name), "seconds": seconds.get(name),
         "bits": 8 * sum(_nbytes(sizes[s], x) for s, x in plan.items()) / sum(sizes.values()),
         "kl": float(torch.cat(scores[name].kl).double().mean())}
        for name, plan in plans.items()
    ]  # fmt: skip


def main() -> None:
    """Measure both models and write the report."""
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    cases: dict[str, tuple[str | Path, Path | None, Path | None]] = {
        "pebble": (options.model, CALIBRATION_TEXT, JUDGE_TEXT), "built in": ("builtin", None, None)
    }  # fmt: skip
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            if Path(options.model) == MODEL and name == "pebble" and not MODEL.exists():
                continue
            found[name] = figures(*case, Path(folder) / name.replace(" ", "-"))
    columns = (("correlation", 2), ("seconds", 1), ("bits", 3), ("kl", 4))
    parts = ["# " + str(__doc__).strip(), machine(options.threads)]
    for name, rows in found.items():
        lines = [
            (r["name"], *("-" if r[k] is None else f"{r[k]:.{digits}f}" for k, digits in columns))
            for r in sorted(rows, key=lambda r: r["kl"])
        ]  # fmt: skip
        parts.append(f"## {name}\n\n" + table(("sensitivity", "correlation", "seconds", "bits", "KL, nats/token"), lines))
    write(work_folder(options.out), "sensitivities", "\n\n".join(parts), found)


if __name__ == "__main__":
    main()
