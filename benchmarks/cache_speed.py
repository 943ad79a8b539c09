"""Decode speed and memory of cache policies against context length, each step beside a dense one of the same model.

python benchmarks/cache_speed.py [--contexts 256 1024 4096 16384] [--policies NAME ...] [--layers 16] [--rows FILE]
python benchmarks/cache_speed.py --peak NAME --contexts 8192 --layers 4

Dense and policy take turns, token by token, on the same weights; so what else runs on the machine meets both. With --peak
a process of its own decodes with one policy only (or "dense") and reports how far its memory rises above the weights.
Rows are appended to FILE as they are measured, and rows that are there are not measured again.
"""

from __future__ import annotations

import copy
import ctypes
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from _harness import MIB, arguments, machine, table, work_folder, write
from cache import EVICTORS, STORED, Rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import assay

STEPS, WARM, BUDGET = 48, 4, 0.25
POLICIES = ("frame alone", "streaming_llm", "h2o", "scissorhands", "keyformer", "snapkv", "prefixkv", "kivi 4", "kivi 2", "fp8",
            "block_float 4", "fireq 4", "think 0.4", "cskv 0.5", "double_sparsity, 1/16 read",
            "double_sparsity, 1/16 read, offloaded", "snapkv 0.5 + kivi 4")  # fmt: skip


def policy(name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and options of a row."""
    if name == "frame alone":
        return ("streaming_llm",), {"budget": 1.0}
    names, options = EVICTORS.get(name) or STORED[name.removesuffix(", offloaded")]
    extra = ({"budget": BUDGET} if name in EVICTORS else {}) | ({"offload": True} if name.endswith("offloaded") else {})
    return names, options | extra


@torch.no_grad()
def measure(given: LlamaForCausalLM, dense: Any, name: str, ids: Tensor) -> dict[str, Any]:
    """Milliseconds of processor time of both, their ratio with quartiles over pairs of steps, and memory in bytes."""
    other = copy.deepcopy(given, {id(p): p for p in given.parameters()})
    names, options = policy(name)
    prompt = ids.shape[1] - STEPS - WARM
    times: list[tuple[float, float]] = []
    with assay.attach(other, *names, calibration=ids[:, :256], **options) as held:
        start = time.process_time()
        cache = other(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
        prefill = time.process_time() - start
        nbytes = held.nbytes
        for i in range(prompt, ids.shape[1]):
            pair = [_step(m, c, ids[:, i : i + 1]) for m, c in ((given, dense), (other, cache))]
            times.append((pair[0], pair[1]))
    dense.crop(-(STEPS + WARM))
    kept = times[WARM:]
    low, middle, high = quantiles([b / a for a, b in kept], n=4)
    mean = sum(b for _, b in kept) / sum(a for a, _ in kept)
    return {"dense_ms": 1000 * quantiles([a for a, _ in kept])[1], "ms": 1000 * quantiles([b for _, b in kept])[1],
            "ratio": middle, "low": low, "high": high, "mean": mean, "bytes": nbytes, "prefill_s": prefill}  # fmt: skip


@torch.no_grad()
def peak(name: str, layers: int, context: int) -> dict[str, float]:
    """MiB above the weights that this process holds after a prompt, and at most while it decodes."""
    given = model(layers)
    ids = torch.randint(3, 8000, (1, context + STEPS))
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    trim(0)
    weights = _status("VmRSS")
    names, options = policy(name) if name != "dense" else ((), {})
    with assay.attach(given, *names, calibration=ids[:, :256], **options) if names else nullcontext():
        cache = given(ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = _status("VmRSS")
        for i in range(context, ids.shape[1]):
            given(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        most = _status("VmHWM")
    return {"held": (held - weights) / MIB, "peak": (most - weights) / MIB}


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def model(layers: int) -> LlamaForCausalLM:
    """A random Llama, 1024 wide, 16 heads of 64 and 4 key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
                         num_key_value_heads=4, vocab_size=8192, max_position_embeddings=1 << 17)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _step(given: LlamaForCausalLM, cache: Any, token: Tensor) -> float:
    start = time.process_time()
    given(token, past_key_values=cache, use_cache=True)
    return time.process_time() - start


@torch.no_grad()
def timed(rows: Rows, layers: int, contexts: list[int], policies: list[str]) -> None:
    """Rows of what is missing."""
    given = model(layers)
    for context in contexts:
        todo = [p for p in policies if not rows.found(layers=layers, context=context, policy=p)]
        if not todo:
            continue
        ids = torch.randint(3, 8000, (1, context + STEPS + WARM))
        start = time.process_time()
        dense = given(ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
        prefill, nbytes = time.process_time() - start, sum(x.keys.nbytes + x.values.nbytes for x in dense.layers)
        for name in todo:
            shared = {"layers": layers, "context": context, "policy": name, "dense_bytes": nbytes, "dense_prefill_s": prefill}
            rows.put(shared | measure(given, dense, name, ids))
            print(rows.rows[-1], flush=True)


def report(rows: Rows) -> str:
    """A table for each length: what a step takes, and what the cache holds."""
    parts = []
    for layers, context in sorted({(r["layers"], r["context"]) for r in rows.rows}, key=lambda x: x[1]):
        found = rows.found(layers=layers, context=context)
        dense = sorted(r["dense_ms"] for r in found)[len(found) // 2]
        lines = [
            ["dense", f"{dense:.1f}", "1", "1", f"{found[0]['dense_bytes'] / MIB:.1f}", f"{found[0]['dense_prefill_s']:.1f}"]
        ]
        lines += [[r["policy"], f"{r['ms']:.1f}", f"{r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f})", f"{r['mean']:.3f}",
                   f"{r['bytes'] / MIB:.1f}", f"{r['prefill_s']:.1f}"] for r in found]  # fmt: skip
        head = (f"{context} tokens, {layers} layers", "step, ms", "of a dense step (quartiles)", "mean of all", "cache, MiB",
                "prompt, s")  # fmt: skip
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def main() -> None:
    """Measure what is missing, and report."""
    parser = arguments(__doc__)
    parser.add_argument("--contexts", type=int, nargs="*", default=[256, 1024, 4096, 16384])
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--peak")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        for context in given.contexts:
            print(given.peak, given.layers, context, peak(given.peak, given.layers, context), flush=True)
        return
    folder = work_folder(given.out)
    rows = Rows(given.rows or folder / "cache_speed.jsonl")
    timed(rows, given.layers, given.contexts, given.policies)
    write(folder, "cache_speed", f"{machine(given.threads)}\n\n{report(rows)}", rows.rows)


if __name__ == "__main__":
    main()
