# ruff: noqa: E402  settings come before the libraries that read them
"""How long each weight method takes for a model of 1.1 billion parameters: one block of its shape, times its blocks.

python benchmarks/large.py [--only trellis vptq] [--bits 3] [--tokens 4096] [--threads 4]

Weights are random, statistics those of a model of two such blocks. What is timed is solving the first one as `compress` does.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import process_time
from typing import Any

from assay.cli import answer

answer.prepare()  # as the command does, before OpenMP reads its settings

import torch
from _harness import CALIBRATION_TEXT, arguments, machine, table, work_folder, write
from _random_llama import TINY_LLAMA, build
from methods import levels

import assay
from assay.execute import execute
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.methods import base
from assay.model.level import Level
from assay.model.progress import Silent
from assay.run import open_model

LAYERS = 2


@dataclass
class Clock(Silent):
    """Hears how long each block took."""

    seconds: dict[int | None, float] = field(default_factory=dict)

    def log(self, message: str, **facts: Any) -> None:
        """Called when a block is done."""
        self.seconds[facts["block"]] = facts["seconds"]


def seconds(model: StreamedModel, profile: Profile, name: str, level: Level) -> tuple[float, float]:
    """Seconds by the wall to solve the first block, and of processors for that and for opening and closing the job."""
    plan, clock = assay.plan(profile.folder, level="int4-g64-asym", method="gptq"), Clock()
    first = {site.name: replace(plan.choices[site.name], level=level.name) for site in model.anatomy.block_sites(0)}
    before = process_time()
    with tempfile.TemporaryDirectory() as folder:
        execute(model, replace(plan, method=name, choices=first), profile, Path(folder), clock)
    return clock.seconds[0], process_time() - before


def row(name: str, level: Level, took: tuple[float, float], weights: int, threads: int) -> list[str]:
    """One line of the table."""
    wall, work = took
    whole = (f"{block * TINY_LLAMA.layers / 60:.1f}" for block in (wall, work / threads))
    return [name, level.name, f"{wall:.1f}", f"{work:.1f}", f"{weights / wall / threads:,.0f}", *whole]


def main() -> None:
    """Time every method."""
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", help="methods")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = work_folder(given.out)
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model"
        build(replace(TINY_LLAMA, layers=LAYERS), path, CALIBRATION_TEXT)
        names = given.only or base.names()
        chosen = {name: Level.parse(levels(str(path), name, [given.bits])[given.bits]) for name in names}
        wanted = [name for name in names if base.weightwise(name)]
        profile = assay.profile(
            path, path.with_name("profile"), calibration=CALIBRATION_TEXT, tokens=given.tokens, methods=sorted({*wanted, "gptq"})
        )
        model = StreamedModel(open_model(path))
        weights = sum(math.prod(site.shape) for site in model.anatomy.block_sites(0))
        for name, level in chosen.items():
            took = figures[name] = seconds(model, profile, name, level)
            rows.append(row(name, level, took, weights, given.threads))
            print(*rows[-1], flush=True)
    blocks = f"{TINY_LLAMA.layers} blocks, minutes"
    head = ("method", "level", "a block, s", "processor s", "weights a second and core", blocks, "if no core waited")
    write(folder, "large", "\n\n".join([machine(given.threads), table(head, rows)]), figures)


if __name__ == "__main__":
    main()
