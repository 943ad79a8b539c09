"""kvpress: presses on the tasks of benchmarks/cache.py. Prints one JSON row for each press and share kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import _cache_tasks as tasks_of
from kvpress import ObservedAttentionPress, PyramidKVPress, RandomPress, SnapKVPress, StreamingLLMPress, TOVAPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "random": lambda r: RandomPress(r),
    "streaming_llm": lambda r: StreamingLLMPress(r),
    "snapkv": lambda r: SnapKVPress(r, window_size=32),
    "pyramid": lambda r: PyramidKVPress(r, window_size=32),
    "tova": lambda r: TOVAPress(r),
    "h2o": lambda r: ObservedAttentionPress(r),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs=2, required=True)
    parser.add_argument("--shares", type=float, nargs="+", required=True)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tasks = tasks_of.make(tokenizer, given.text, *given.sizes)
    for name, press in PRESSES.items():
        attention = "eager" if name == "h2o" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32", attn_implementation=attention).eval()
        size = lambda _, cache: sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)  # noqa: E731
        dense, full = tasks_of.continued(model, tasks, nullcontext, False, size)
        for share in given.shares:

            @contextmanager
            def enter() -> Iterator[None]:
                with press(1 - share)(model):
                    yield

            logits, nbytes = tasks_of.continued(model, tasks, enter, False, size)
            row = {
                "who": "kvpress", "policy": name, "share": share, "bytes": nbytes / full,
                "kl": tasks_of.divergence(dense, logits),
                "known": tasks_of.recall(model, tokenizer, tasks, enter, False, True),
                "later": tasks_of.recall(model, tokenizer, tasks, enter, False, False),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
