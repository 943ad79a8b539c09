"""Predicted against measured KL: whole plans over a range of budgets, and one matrix at a time.

python benchmarks/prediction.py [--model DIR|builtin] [--bits 2.3 3 4]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, arguments, machine, table, work_folder, write

import assay
from assay.budget.probe import nearest
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.level import Level
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare
from assay.run import open_model

BITS = (2.3, 2.6, 3.0, 3.5, 4.0, 4.3, 5.0)


def plans(model: str, profile: Path, bits: Sequence[float], judge: Path | None, work: Path) -> list[dict[str, Any]]:
    """What `assay verify` says of the KL, in nats per token, of a mixed plan by the default method at each budget."""
    rows = []
    for target in bits:
        out = work / f"b{target}"
        assay.compress(model, out, bits=target, profile=profile)
        rows.append({"bits": target, **assay.verify(out, model, text=judge)["kl"]})
        print(rows[-1], flush=True)
    return rows


def line(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    low, high = row["predicted_low"], row["predicted_high"]
    inside = "yes" if low <= row["measured"] <= high else "no"
    figures = (f"{row['predicted']:.5f}", f"{low:.5f} to {high:.5f}", f"{row['measured']:.5f}")
    return [str(row["bits"]), *figures, f"{row['predicted'] / row['measured']:.2f}", inside]


def correlation(model: str, profile: Path, judge: Path | None) -> tuple[int, float]:
    """How many matrices, and the correlation of log price and log KL over them, each rounded to nearest alone, at 3 bits."""
    prices = Profile.open(profile).prices
    streamed = StreamedModel(open_model(model))
    text = windows(streamed.checkpoint, judge, "evaluation", 7680, 256, streamed.vocabulary)
    level = Level(3, 64)
    names = [s.name for s in streamed.anatomy.sites.values() if s.block is not None]
    candidates = {n: Candidate(streamed, nearest(lambda site, n=n: level if site.name == n else None)) for n in names}
    scores = compare(streamed, candidates, text, Silent())
    measured = np.log([float(torch.cat(scores[n].kl).double().mean()) for n in names])
    predicted = np.log([prices[n][level.name]["nearest"] for n in names])
    return len(names), float(np.corrcoef(predicted, measured)[0, 1])


def main() -> None:
    """Measure plans and matrices."""
    parser = arguments(__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=BITS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = str(given.model)
    calibration, judge = (None, None) if model == "builtin" else (CALIBRATION_TEXT, JUDGE_TEXT)
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        assay.profile(model, profile, calibration=calibration)
        rows = plans(model, profile, given.bits, judge, Path(folder))
        count, related = correlation(model, profile, judge)
    found = table(("bits", "predicted", "interval", "measured", "ratio", "inside"), map(line, rows))
    text = "\n\n".join([machine(given.threads), found, f"log correlation over {count} matrices: {related:.3f}"])
    write(work_folder(given.out), f"prediction-{given.model.name}", text, {"plans": rows, "correlation": related})


if __name__ == "__main__":
    main()
