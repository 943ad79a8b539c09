"""How long each weight method takes for a model of 1.1 billion parameters: one block of its shape, times its blocks.

python benchmarks/large.py [--only trellis vptq] [--bits 3] [--tokens 4096] [--threads 4]

Weights are random, statistics those of a model of two such blocks. Of matrices of one shape in the block one is encoded.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, arguments, machine, table, work_folder, write
from _random_llama import TINY_LLAMA, build
from methods import levels

import assay
from assay.budget.probe import statistics
from assay.measure.curvatures import Curvatures
from assay.measure.stream import StreamedModel, read_weight
from assay.methods import base
from assay.model.level import Level
from assay.run import open_model

LAYERS = 2


def seconds(model: StreamedModel, curvatures: Curvatures, name: str, level: Level) -> float:
    """Wall seconds to encode the first block."""
    method, total = base.get(name)(), 0.0
    sites = {site.shape: site for site in model.anatomy.block_sites(0)}
    counts = Counter(site.shape for site in model.anatomy.block_sites(0))
    for shape, site in sites.items():
        weight, found = read_weight(model, site), statistics(method, [curvatures[site.name]])
        begun = time.perf_counter()
        method.encode(weight[None], level, torch.bfloat16, found)
        total += counts[shape] * (time.perf_counter() - begun)
    return total


def row(name: str, level: Level, took: float, weights: int, threads: int) -> list[str]:
    """One line of the table."""
    whole = took * TINY_LLAMA.layers
    return [name, level.name, f"{took:.1f}", f"{weights / took / threads:,.0f}", f"{whole / 60:.1f}"]


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
        wanted = [name for name in base.names() if base.weightwise(name)]
        profile = assay.profile(
            path, path.with_name("profile"), calibration=CALIBRATION_TEXT, tokens=given.tokens, methods=wanted
        )
        model, curvatures = StreamedModel(open_model(path)), profile.curvatures(0, base.weightwise(*wanted))
        weights = sum(math.prod(site.shape) for site in model.anatomy.block_sites(0))
        for name in given.only or base.names():
            level = Level.parse(levels(str(path), name, [given.bits])[given.bits])
            took = figures[name] = seconds(model, curvatures, name, level)
            rows.append(row(name, level, took, weights, given.threads))
            print(*rows[-1], flush=True)
    head = ("method", "level", "a block, s", "weights a second and core", f"{TINY_LLAMA.layers} blocks, minutes")
    write(folder, "large", "\n\n".join([machine(given.threads), table(head, rows)]), figures)


if __name__ == "__main__":
    main()
