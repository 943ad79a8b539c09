"""Searches the tables of the trellis codes, and measures those in use.

    PYTHONPATH=src python scripts/search_trellis.py --states 12 --trials 1500
    PYTHONPATH=src python scripts/search_trellis.py --states 10 12 14 16 --measure

The search tries random permutations on a short Gaussian sample and improves the best three step by step on a longer
one. Distortion is measured on another sample; its gap is the bits by which it lies above the bound 2^(-2 rate).
"""

from __future__ import annotations

import argparse
import time
from math import log2

import torch
from torch import Tensor

from assay.methods.grid._trellis import encode_rows
from assay.methods.grid.trellis import MEMORIES_DECIDED, MEMORIES_ROUND_SEAM, encode
from assay.model.trellis import Trellis, permuted_quantiles

LENGTH = 4096


def gaussian(rows: int, seed: int, length: int = LENGTH) -> Tensor:
    """Quantiles of a Gaussian in random order [rows, length]: exact variance, so less noise than random numbers."""
    count = rows * length
    quantiles = torch.special.ndtri((torch.arange(count).double() + 0.5) / count).float()
    return quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(seed))].view(rows, length)


def distortion(state_bits: int, k: int, table: Tensor, x: Tensor) -> float:
    """Mean squared error of `x` in a trellis of k bits a step with any table [2^L]."""
    memory = -(-state_bits // k)
    words, values = torch.empty(len(x), -(-x.shape[1] * k // 32), dtype=torch.int32), torch.empty_like(x)
    encode_rows(
        state_bits, torch.tensor([k]).numpy(), table[None].numpy(), MEMORIES_DECIDED * memory, MEMORIES_ROUND_SEAM * memory,
        x.numpy(), x[:, :0].numpy(), words.numpy(), values.numpy(),
    )  # fmt: skip
    return float((values - x).square().mean())


class Search:
    """Permutations for one L and k: (a, b, split, percent) as `permuted_quantiles` takes them."""

    def __init__(self, state_bits: int, k: int, seed: int) -> None:
        self.state_bits, self.k = state_bits, k
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def error(self, found: tuple[int, ...], x: Tensor) -> float:
        return distortion(self.state_bits, self.k, permuted_quantiles(self.state_bits, *found), x)

    def random(self) -> tuple[int, ...]:
        half = 1 << (self.state_bits - 1)
        percent = min(150, 95 + 4 * self.k + 10 * max(0, 2 * self.k - self.state_bits))
        return 2 * self.below(half) + 1, 2 * self.below(half) + 1, 1 + self.below(self.state_bits - 1), percent

    def changed(self, found: tuple[int, ...]) -> tuple[int, ...]:
        new, count = list(found), 1 << self.state_bits
        which = self.below(4)
        if which < 2:
            small = self.below(3) > 0
            new[which] = (new[which] + 2 * self.below(13) - 12) % count if small else new[which] ^ (2 << self.below(15)) % count
        elif which == 2:
            new[2] = min(self.state_bits - 1, max(1, new[2] + (1, -1)[self.below(2)]))
        else:
            new[3] += (-4, -2, -1, 1, 2, 4)[self.below(6)]
        return tuple(new)

    def run(self, trials: int, steps: int) -> tuple[int, ...]:
        few, more = gaussian(1, 0), gaussian(4, 1)
        first = sorted((self.error(p, few), p) for p in (self.random() for _ in range(trials)))[:30]
        ends = []
        for error, found in sorted((self.error(p, more), p) for _, p in first)[:3]:
            for _ in range(steps):
                trial = self.changed(found)
                trial_error = self.error(trial, more)
                if trial_error < error:
                    error, found = trial_error, trial
            ends.append((error, found))
        return min(ends)[1]


def report(name: str, rate: float, error: float, rest: str) -> None:
    print(f"{name}  distortion {error:.5f}  gap {log2(error) / 2 + rate:.4f} bit  {rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, nargs="+", default=[12])
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4])
    parser.add_argument("--trials", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="search nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = gaussian(16, 2)
    for state_bits in args.states:
        for rate in args.bits:
            name = f"L {state_bits:2d}  rate {rate:4.2f}"
            if args.measure:
                trellis = Trellis.of_rate(rate, state_bits)
                encode(trellis, x[:1, :256])
                start = time.process_time()
                values = encode(trellis, x).values
                speed = x.numel() / (time.process_time() - start)
                report(name, rate, float((values - x).square().mean()), f"{speed / 1000:.0f} thousand weights/s")
            else:
                found = Search(state_bits, int(rate), args.seed).run(args.trials, args.trials // 8)
                report(name, rate, distortion(state_bits, int(rate), permuted_quantiles(state_bits, *found), x), str(found))


if __name__ == "__main__":
    main()
