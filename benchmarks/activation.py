"""What half the inputs of a linear map save in time at batch 1: a kernel that skips rows, beside torch's product.

python benchmarks/activation.py [--sizes 256 1024 2048 4096] [--threads 1]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import arguments, machine, table, work_folder, write

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


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {size: measure(size) for size in given.sizes}
    rows = [[f"{n} x {n}", *(f"{r[k]:.0f}" for k in ("dense", "gather", "skip", "skip_none")), f"{r['dense'] / r['skip']:.2f}"]
            for n, r in found.items()]  # fmt: skip
    head = ("float32 weights", "torch, all rows, µs", "torch, index then product", "kernel, half skipped", "kernel, none skipped",
            "times faster than torch")  # fmt: skip
    write(work_folder(given.out), "activation", f"{machine(given.threads)}\n\n{table(head, rows)}", found)


if __name__ == "__main__":
    main()
