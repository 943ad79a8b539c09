"""The time that no implementation can beat: multiply-adds by the rate of this machine's matmul.

Counts what measuring and solving a Llama takes at the least, all of it as dense float32 products.

python benchmarks/_floor.py MODEL WINDOWS LENGTH THREADS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

REPEATS = 10
SECONDS = 0.5


@dataclass(frozen=True)
class Product:
    """`count` products [m, k] x [k, n]. part: its purpose; gradients: only two-sided needs it."""

    part: str
    m: int
    k: int
    n: int
    count: float
    gradients: bool = False

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds of all of them."""
        return float(self.m) * self.k * self.n * self.count


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a Llama and of its calibration, in elements and tokens."""

    config: PretrainedConfig
    windows: int
    length: int

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.windows * self.length

    def linears(self) -> Iterator[tuple[int, int, bool]]:
        """Inputs and outputs of a block's linears; True for the first that reads an input."""
        c = self.config
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        wide, narrow = c.num_attention_heads * head, c.num_key_value_heads * head
        yield c.hidden_size, wide, True
        yield c.hidden_size, narrow, False
        yield c.hidden_size, narrow, False
        yield wide, c.hidden_size, True
        yield c.hidden_size, c.intermediate_size, True
        yield c.hidden_size, c.intermediate_size, False
        yield c.intermediate_size, c.hidden_size, True


def products(model: Path, windows: int, length: int) -> list[Product]:
    """Everything that profiling and compressing a model takes at the least.

    Forward: every linear and attention (causal, so half of its square) once. Backward: the forward
    of each block once more and the gradients of its inputs (those of weights are not needed).
    H, G: second moments of inputs and output gradients, of which half is enough by symmetry.
    Solvers: Cholesky factor of the inverse (2/3 n^3), error feedback (half of the square).
    """
    sizes = Sizes(AutoConfig.from_pretrained(model), windows, length)
    blocks = sizes.config.num_hidden_layers
    found = [p for linear in sizes.linears() for p in _linear(sizes, *linear, blocks)]
    return [*found, *_attention(sizes, blocks), *_head(sizes)]


def _linear(sizes: Sizes, i: int, o: int, owner: bool, blocks: int) -> Iterator[Product]:
    tokens = sizes.tokens
    yield Product("forward sweep", tokens, i, o, blocks)
    yield Product("backward sweep", tokens, i, o, blocks, True)
    yield Product("backward sweep", tokens, o, i, blocks, True)
    yield Product("G", o, tokens, o, blocks / 2, True)
    yield Product("solver, columns", o, i, i, blocks / 2)
    yield Product("solver, rows", i, o, o, blocks / 2, True)
    yield Product("solver, rows", o, o, o, blocks * 2 / 3, True)
    if owner:
        yield Product("H", i, tokens, i, blocks / 2)
        yield Product("solver, columns", i, i, i, blocks * 2 / 3)


def _attention(sizes: Sizes, blocks: int) -> Iterator[Product]:
    config, length = sizes.config, sizes.length
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = blocks * sizes.windows * config.num_attention_heads / 2
    yield Product("forward sweep", length, head, length, 2 * count)
    yield Product("backward sweep", length, head, length, 6 * count, True)


def _head(sizes: Sizes) -> Iterator[Product]:
    hidden, vocabulary = sizes.config.hidden_size, sizes.config.vocab_size
    yield Product("backward sweep", sizes.tokens, hidden, vocabulary, 1, True)
    yield Product("backward sweep", sizes.tokens, vocabulary, hidden, 1, True)


def rates(found: list[Product], threads: int) -> dict[tuple[int, int, int], float]:
    """Measured float32 multiply-adds per second of every shape that occurs.

    The best of one thread and all: on a crowded machine a product waits for its slowest thread.
    """
    best: dict[tuple[int, int, int], float] = {}
    for count in {1, threads}:
        torch.set_num_threads(count)
        for shape in {(p.m, p.k, p.n) for p in found}:
            best[shape] = max(best.get(shape, 0.0), _rate(*shape))
    return best


def _rate(m: int, k: int, n: int) -> float:
    """Best of many: other jobs can only slow a product down."""
    a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    seconds: list[float] = []
    while len(seconds) < REPEATS or sum(seconds) < SECONDS:
        began = time.perf_counter()
        torch.matmul(a, b, out=out)
        seconds.append(time.perf_counter() - began)
    return m * k * n / min(seconds)


@dataclass(frozen=True)
class Part:
    """Multiply-adds of one part and the seconds they take at the measured rate."""

    name: str
    gradients: bool
    multiply_adds: float
    seconds: float


def floor(model: Path, windows: int, length: int, threads: int) -> list[Part]:
    """The parts of the floor on this machine with `threads` threads."""
    found = products(model, windows, length)
    measured = rates(found, threads)
    parts: dict[str, Part] = {}
    for p in found:
        seconds = p.multiply_adds / measured[p.m, p.k, p.n]
        old = parts.get(p.part, Part(p.part, p.gradients, 0.0, 0.0))
        total = old.multiply_adds + p.multiply_adds, old.seconds + seconds
        parts[p.part] = Part(p.part, p.gradients, *total)
    return list(parts.values())


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    print(json.dumps([vars(part) for part in floor(Path(folder), *map(int, numbers))]))
