"""Does the interval on the predicted loss hold? Random plans of random methods, predicted and measured.

python benchmarks/promise.py [--plans 40] [--seed 1] [--threads 1]
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, MODEL, arguments, machine, table, work_folder, write

import assay
from assay.budget.forecast import Forecast
from assay.budget.menu import Option
from assay.budget.plan import Plan
from assay.execute import Results, execute
from assay.measure.profile import Profile
from assay.measure.stream import Override, StreamedModel
from assay.measure.text import windows
from assay.model.errors import InputError
from assay.model.progress import Silent
from assay.model.sites import Site
from assay.prove.divergence import Candidate, compare, interval
from assay.run import open_model

METHODS = ("nearest", "clip", "gptq", "two_sided", "admm", "trellis")
ENGINES = {"trellis": ("assay",)}
KEEPS = ("*layers.0.*", "*layers.3.*", "*layers.5.*", "*.q_proj*", "*.v_proj*", "*.o_proj*", "*.down_proj*", "*.up_proj*")
TOKENS = 15_360
TOGETHER = 10


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a random plan was asked for."""

    method: str
    engine: str
    planner: str
    bits: float
    by_size: bool
    keep: tuple[str, ...]


def draw(generator: random.Random) -> Asked:
    """A random request: bits of 2.2 to 6, often with parts kept, by average bits or by file size."""
    method = generator.choice(METHODS)
    return Asked(
        method, generator.choice(ENGINES.get(method, ("transformers", "assay"))),
        generator.choice(("lagrange", "lagrange", "integer", "uniform")), round(generator.uniform(2.2, 6), 2),
        generator.random() < 0.3, tuple(generator.sample(KEEPS, generator.choice((0, 0, 1, 2)))),
    )  # fmt: skip


def plan(profile: Profile, asked: Asked) -> Plan | None:
    """The plan, or None where nothing of that kind fits."""
    size = int(profile.index["parameters"] * asked.bits / 8)
    budget = {"size": size} if asked.by_size else {"bits": asked.bits}
    try:
        return assay.plan(
            profile.folder, engine=asked.engine, method=asked.method, keep=asked.keep, planner=asked.planner, **budget
        )  # type: ignore[arg-type]
    except InputError:
        return None


def expected_damage(profile: Profile, chosen: Plan) -> float:
    """Sum of what the options are expected to leave, nats per token."""
    forecast = Forecast.from_index(profile.index)
    return forecast.total(Option(c.level, c.nbytes, c.damage) for c in chosen.choices.values())


def weights_of(results: Results) -> Override:
    """Compressed weights where there are some."""

    def override(site: Site, weight: torch.Tensor) -> torch.Tensor:
        return results.packed(site.name).decode().float() if site.name in results.solved else weight

    return override


def measure(name: str, model: str | Path, shipped: bool, plans: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """One row a plan of one model."""
    texts = (None, None) if shipped else (CALIBRATION_TEXT, JUDGE_TEXT)
    profile = assay.profile(model, work / f"promise-{name}", calibration=texts[0], methods=METHODS)
    streamed, generator = StreamedModel(open_model(model)), random.Random(f"{name} {seed}")
    judge = windows(streamed.checkpoint, texts[1], "evaluation", TOKENS, 256, streamed.vocabulary)
    rows: list[dict[str, Any]] = []
    while len(rows) < plans:
        made: dict[str, tuple[Asked, Plan]] = {}
        while len(made) < min(TOGETHER, plans - len(rows)):
            asked = draw(generator)
            if chosen := plan(profile, asked):
                made[str(len(rows) + len(made))] = asked, chosen
        candidates = {}
        for key, (_, chosen) in made.items():
            solved = execute(streamed, chosen, profile, work / f"promise-{name}-{seed}-{key}", Silent())
            candidates[key] = Candidate(StreamedModel(streamed.checkpoint, weights_of(solved)))
        scores = compare(streamed, candidates, judge, Silent())
        for key, (asked, chosen) in made.items():
            kl = torch.cat(scores[key].kl).double().mean(1)
            rows.append(dataclasses.asdict(asked) | {
                "model": name, "real_bits": chosen.bits, "predicted": chosen.predicted, "low": chosen.predicted_low,
                "high": chosen.predicted_high, "measured": float(kl.mean()), "measured_interval": interval(kl),
                "expected_damage": expected_damage(profile, chosen),
            })  # fmt: skip
            print(name, asked, f"{chosen.predicted:.5f} {float(kl.mean()):.5f}", flush=True)
    return rows


def held(row: dict[str, Any]) -> bool:
    """Whether what was measured lies in the interval that was promised."""
    return bool(row["low"] <= row["measured"] <= row["high"])


def report(rows: list[dict[str, Any]]) -> list[str]:
    """How often the interval held, and every plan."""
    header = ("model", "method", "engine", "planner", "bits", "kept", "predicted", "interval", "measured", "ratio", "inside")
    lines = [
        (r["model"], r["method"], r["engine"], r["planner"], f"{r['real_bits']:.2f}", " ".join(r["keep"]).replace("*", "∗"),
         f"{r['predicted']:.5f}", f"{r['low']:.5f} to {r['high']:.5f}", f"{r['measured']:.5f}",
         f"{r['measured'] / r['predicted']:.2f}", "yes" if held(r) else "no")
        for r in rows
    ]  # fmt: skip
    inside = [f"{n}: {sum(held(r) for r in rows if r['model'] == n)} of {sum(r['model'] == n for r in rows)}"
              for n in dict.fromkeys(r["model"] for r in rows)]  # fmt: skip
    width = sum(r["high"] / r["low"] for r in rows if r["low"] > 0) / max(1, len(rows))
    return [f"Inside the interval: {', '.join(inside)}. High over low, mean: {width:.2f}.", table(header, lines)]


def main() -> None:
    """Measure what is asked for on the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=("pebble", "builtin"), default=["pebble", "builtin"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = work_folder(given.out)
    rows: list[dict[str, Any]] = []
    for name, model in (("pebble", MODEL), ("builtin", "builtin")):
        if name in given.only:
            rows += measure(name, model, name == "builtin", given.plans, given.seed, work)
    tag = "" if len(given.only) == 2 else f"-{given.only[0]}"
    write(work, f"promise{tag}-{given.seed}", "\n\n".join([machine(given.threads), *report(rows)]), rows)


if __name__ == "__main__":
    main()
