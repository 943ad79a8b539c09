"""assay, in the peers' place: profile, plan, compress, then the decoded weights.

The budget is what the width takes in groups of one size, asymmetric, everywhere; a mixed plan may
spend the same bytes unevenly.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from assay.cli import answer

answer.prepare()  # as the command does, before OpenMP and MKL read their settings

import assay
from _common import Clock, Job, check, parser, peak_rss, read_job, write_result
import assay.run  # noqa: F401  outside the clock, like the peers' imports
from assay.budget.plan import Plan
from assay.model.level import Level
from transformers import AutoModelForCausalLM

Shapes = dict[str, tuple[int, int]]


def block_shapes(job: Job) -> Shapes:
    """Rows and columns of every weight matrix inside the blocks, by tensor name."""
    sites = assay.inspect(job.model)["sites"]
    return {row["site"]: tuple(row["shape"]) for row in sites if row["block"] is not None}


def budget(job: Job, shapes: Shapes) -> float:
    """Bits per weight inside the blocks, all stored bytes counted, of one level everywhere."""
    level = Level(job.bits, job.group_size)
    stored = sum(8 * level.nbytes(*shape) for shape in shapes.values())
    return stored / sum(rows * columns for rows, columns in shapes.values())


def bits_of(levels: dict[str, Level], shapes: Shapes) -> float:
    """Bits per weight as they are counted for the peers: codes, scales and zero points."""
    stored = weights = 0
    for name, (rows, columns) in shapes.items():
        level = levels[name]
        per_group = 16 + (0 if level.symmetric else level.bits)
        stored += rows * (columns * level.bits + level.groups(columns) * per_group)
        weights += rows * columns
    return stored / weights


def options() -> argparse.Namespace:
    """The command line."""
    given = parser(__doc__)
    given.add_argument(
        "--text", type=Path, required=True, help="text that the ids are the start of"
    )
    given.add_argument("--method", default="auto", help="gptq, two_sided, auto or best")
    given.add_argument("--sequential", action="store_true", help="solve in the order of the model")
    given.add_argument("--plan", choices=("uniform", "mixed"), default="uniform")
    return given.parse_args()


def compress(job: Job, given: argparse.Namespace, work: Path, shapes: Shapes) -> tuple[Plan, dict[str, Level]]:
    """Profile and compress into `work`/packed, on exactly the job's tokens, which are the beginning of the text.

    Returns the plan and the level of every weight in the blocks.
    """
    ids = job.ids()
    assay.compress(
        job.model,
        work / "packed",
        calibration=given.text,
        tokens=ids.numel(),
        window=ids.shape[1],
        bits=budget(job, shapes),
        method=given.method,
        engine=engine(given),
        uniform=given.plan == "uniform",
        threads=job.threads,
        sequential=given.sequential,
    )
    recipe = json.loads((work / "packed" / "assay" / "recipe.json").read_text())
    if not hashlib.sha256(ids.numpy().tobytes()).hexdigest().startswith(recipe["calibration"]["digest"]):
        raise RuntimeError("assay calibrated on other tokens than the peers")
    plan = Plan.load(work / "packed" / "assay" / "plan.yaml")
    return plan, {name: Level.parse(plan.choices[name].level) for name in shapes}


def engine(given: argparse.Namespace) -> str:
    """What the result is for: stock transformers, or for `best` whatever assay itself can read."""
    return "assay" if given.method == "best" else "transformers"


def main() -> None:
    """Compress the model on the command line."""
    given = options()
    job, clock = read_job(given), Clock()
    work = job.out.with_name(f"{job.out.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shapes = block_shapes(job)
    with clock.running():
        plan, levels = compress(job, given, work, shapes)
    memory = peak_rss()
    assay.export(work / "packed", "plain", job.out)
    integers = {name: v for name, v in levels.items() if v.format == "int"}
    widths = {name: (v.bits, v.group_size or shapes[name][1]) for name, v in integers.items()}
    if integers:  # a trellis has no few values a group that could be counted
        check(job.load(), AutoModelForCausalLM.from_pretrained(job.out).state_dict(), widths)
    facts = {"peer": "assay", "version": assay.__version__, "method": given.method}
    facts |= {"levels": Counter(level.name for level in levels.values())}
    bits = bits_of(levels, shapes) if integers else plan.bits
    write_result(job, clock, memory, **facts, bits_in_blocks=bits)


if __name__ == "__main__":
    main()
