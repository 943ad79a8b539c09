"""Predicted against measured KL: whole plans over a range of budgets, and one matrix at a time.

python benchmarks/prediction.py [--model DIR] [--bits 2.3 3 4]     (--model builtin for the shipped one)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL

import assay
from assay.budget.probe import nearest
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.level import Level
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare
from assay.run import open_model


def plans(model: str, profile: Path, bits: list[float], judge: Path | None, work: Path) -> None:
    """One row a budget: bits, predicted and measured KL in nats per token, their ratio, interval hit."""
    print("| bits | predicted | interval | measured | ratio | inside |\n|---|---|---|---|---|---|")
    for target in bits:
        out = work / f"b{target}"
        assay.compress(model, out, bits=target, profile=profile)
        kl = assay.verify(out, model, text=judge)["kl"]
        low, high, ratio = kl["predicted_low"], kl["predicted_high"], kl["predicted"] / kl["measured"]
        inside = "yes" if low <= kl["measured"] <= high else "no"
        print(f"| {target} | {kl['predicted']:.5f} | {low:.5f} to {high:.5f} | {kl['measured']:.5f} | {ratio:.2f} | {inside} |")


def matrices(model: str, profile: Path, judge: Path | None) -> None:
    """Correlation of log price and log KL over matrices rounded to nearest alone, at 3 bits."""
    prices = Profile.open(profile).prices
    streamed = StreamedModel(open_model(model))
    text = windows(streamed.checkpoint, judge, "evaluation", 7680, 256, streamed.vocabulary)
    level = Level(3, 64)
    names = [s.name for s in streamed.anatomy.sites.values() if s.block is not None]
    candidates = {n: Candidate(streamed, nearest(lambda site, n=n: level if site.name == n else None)) for n in names}
    scores = compare(streamed, candidates, text, Silent())
    measured = np.log([float(torch.cat(scores[n].kl).double().mean()) for n in names])
    predicted = np.log([prices[n][level.name]["nearest"] for n in names])
    print(f"\nlog correlation over {len(names)} matrices: {np.corrcoef(predicted, measured)[0, 1]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--bits", type=float, nargs="+", default=[2.3, 2.6, 3.0, 3.5, 4.0, 4.3, 5.0])
    given = parser.parse_args()
    shipped = given.model == "builtin"
    calibration, judge = (None, None) if shipped else (CALIBRATION_TEXT, JUDGE_TEXT)
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        assay.profile(given.model, profile, calibration=calibration)
        plans(given.model, profile, given.bits, judge, Path(folder))
        matrices(given.model, profile, judge)


if __name__ == "__main__":
    main()
