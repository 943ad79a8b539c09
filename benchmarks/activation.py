"""What half the inputs of a linear map save in time at batch 1: a kernel that skips rows, beside torch's product.

python benchmarks/activation.py [--sizes 256 1024 2048 4096] [--threads 1]
python benchmarks/activation.py --quality [--steps 160]

With --quality: KL of policies at several shares, and perplexity and zeros of a model tuned to ReLUs with and without penalty.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, JUDGE_TEXT, arguments, machine, table, token_windows, work_folder, write
from transformers import AutoModelForCausalLM

import assay
from assay.relu_tuning import Stages
from assay.runtime.skip import skip_rows

ROUNDS, BUDGET = 7, 0.15


def seconds(act: Callable[[], Any]) -> float:
    """The best of some rounds, processor time of one call."""
    act()
    found = []
    for _ in range(ROUNDS):
        start, count = time.process_time(), 0
        while time.process_time() - start < BUDGET:
            act()
            count += 1
        found.append((time.process_time() - start) / count)
    return min(found)


def measure(size: int) -> dict[str, float]:
    """Microseconds of a square map of float32 weights."""
    generator = torch.Generator().manual_seed(0)
    # several copies, so that the weights of one call are not in the cache of the next, as in a model
    copies = max(1, min(16, (256 << 20) // (4 * size * size)))
    weights = [torch.randn(size, size, generator=generator) for _ in range(copies)]
    rows = [w.T.contiguous() for w in weights]
    x, turn = torch.randn(size, generator=generator), [0]
    half = float(x.abs().median())

    def following() -> int:
        turn[0] = (turn[0] + 1) % copies
        return turn[0]

    masked = torch.where(x.abs() > half, x, 0)
    dense = seconds(lambda: weights[following()] @ masked)
    taken = (x.abs() > half).nonzero()[:, 0]
    gathered = seconds(lambda: rows[following()][taken].T @ x[taken])
    ours = seconds(lambda: skip_rows(x, rows[following()], x.abs() > half))
    every = seconds(lambda: skip_rows(x, rows[following()], x.abs() > -1))
    torch.testing.assert_close(skip_rows(x, rows[0], x.abs() > half), weights[0] @ masked, atol=1e-2, rtol=1e-3)
    return {"dense": dense * 1e6, "gather": gathered * 1e6, "skip": ours * 1e6, "skip_none": every * 1e6}


def quality(folder: Path, steps: int) -> dict[str, Any]:
    """KL on 8 windows of 256 test tokens, thresholds from 8 of the validation text; ReLU tuning on 900 windows of 128."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration, judged = (token_windows(folder, text, 8) for text in (CALIBRATION_TEXT, JUDGE_TEXT))
    found: dict[str, Any] = {}
    with torch.no_grad():
        p = model(judged, use_cache=False).logits.log_softmax(-1)
        for share in (0.25, 0.5, 0.65):
            for name, options in (("teal", {}), ("wina", {}), ("wina, rotated", {"rotate": True}), ("r_sparse", {})):
                with assay.attach(model, name.split(",")[0], sparsity=share, calibration=calibration, **options):
                    q = model(judged, use_cache=False).logits.log_softmax(-1)
                found[f"{name} {share:.0%}"] = float((p.exp() * (p - q)).sum(-1).mean())
    train, held_out = token_windows(folder, CALIBRATION_TEXT, 900, 128), token_windows(folder, JUDGE_TEXT, 32, 128)
    for penalty in (0.0, 0.8):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        stages = Stages(40, (penalty / 8, penalty), (60, steps * 9 // 10))
        tuned = assay.tune_relu(model, train, held_out, steps=steps, stages=stages, rate=1.5e-4)
        found[f"relu, penalty {penalty}"] = {"perplexity": [math.exp(x) for x in tuned.loss], "zeros": tuned.zeros}
    return found


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--steps", type=int, default=160)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.quality:
        figures = quality(given.model, given.steps)
        lines = table(("policy or tuning", "KL in nats, or perplexity and zeros"), [[k, str(v)] for k, v in figures.items()])
        write(work_folder(given.out), "activation_quality", f"{machine(given.threads)}\n\n{lines}", figures)
        return
    found = {size: measure(size) for size in given.sizes}
    rows = [[f"{n} x {n}", *(f"{r[k]:.0f}" for k in ("dense", "gather", "skip", "skip_none")), f"{r['dense'] / r['skip']:.2f}"]
            for n, r in found.items()]  # fmt: skip
    head = ("float32 weights", "torch, all rows, µs", "torch, index then product", "kernel, half skipped", "kernel, none skipped",
            "times faster than torch")  # fmt: skip
    write(work_folder(given.out), "activation", f"{machine(given.threads)}\n\n{table(head, rows)}", found)


if __name__ == "__main__":
    main()
