"""Tokens per second when one token follows another: `assay.load` at 4 and 8 bits beside the bf16 model in transformers.

python benchmarks/decode.py [--layers 8] [--tokens 16] [--rounds 5] [--threads 4]

The model is a Llama of random weights, too large for the caches of most machines. Every round times each contestant once,
so that the ratios of a round see the same machine. Beside each stands the bound by memory: the bytes that one token must
read (weights in the blocks and the head) over the bandwidth at which torch sums as many bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from _harness import CALIBRATION_TEXT, arguments, machine, table, work_folder, write
from _random_llama import Shape, build
from transformers import AutoModelForCausalLM

import assay
from assay import engines
from assay.engines.write import write as write_checkpoint
from assay.methods.base import Statistics
from assay.methods.quantize.nearest import Nearest
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level
from assay.model.packed import Packed

LEVELS = {"4 bits, groups of 64": "int4-g64-asym", "8 bits, a scale a row": "int8-channel-sym"}
PROMPT = 16


def compressed(source: Checkpoint, level: Level, folder: Path) -> Path:
    """The model with every matrix of its blocks rounded to the nearest."""
    names = [n for n in source.names if "_proj" in n]

    def encode(name: str) -> Packed:
        return Nearest().encode(source.read(name).float()[None], level, torch.bfloat16, Statistics())[0]

    loaders = {name: partial(encode, name) for name in names}
    write_checkpoint(folder, source, loaders, engines.get("transformers"), {}, dict.fromkeys(names, level))
    return folder


def bytes_of_a_token(folder: Path) -> int:
    """Bytes of the weights that every token reads: all but the embedding."""
    source = Checkpoint.open(folder)
    return sum(source.nbytes(name) for name in source.names if "embed_tokens" not in name)


def seconds_a_token(model: Any, tokens: int) -> float:
    """Median time of one forward pass of one token, after a prompt."""
    ids, times = torch.arange(PROMPT)[None] + 5, []
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        for step in range(tokens):
            start = perf_counter()
            cache = model(ids[:, step % PROMPT][:, None], past_key_values=cache, use_cache=True).past_key_values
            times.append(perf_counter() - start)
    return median(times)


def bandwidth(nbytes: int) -> float:
    """Bytes a second at which torch sums memory of this size."""
    data, times = torch.ones(nbytes // 8, dtype=torch.int64), []
    for _ in range(5):
        start = perf_counter()
        data.sum()
        times.append(perf_counter() - start)
    return data.nbytes / min(times)


def main() -> None:
    """Build, time and report."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(2048, 5632, options.layers, 32, 4, 4096)
    with tempfile.TemporaryDirectory(dir=work_folder(options.out)) as work:
        build(shape, Path(work) / "bf16", CALIBRATION_TEXT)
        folders = {"bf16, transformers": Path(work) / "bf16"}
        for name, level in LEVELS.items():
            folders[name] = compressed(Checkpoint.open(Path(work) / "bf16"), Level.parse(level), Path(work) / level)
        opened: dict[str, Callable[[], Any]] = {name: partial(assay.load, folder) for name, folder in folders.items()}
        opened["bf16, transformers"] = partial(AutoModelForCausalLM.from_pretrained, folders["bf16, transformers"], dtype="auto")
        models = {name: load().eval() for name, load in opened.items()}
        sizes = {name: bytes_of_a_token(folder) for name, folder in folders.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            times[name].append(seconds_a_token(model, options.tokens))
    speed = bandwidth(sizes["bf16, transformers"])
    rows = []
    for name, found in times.items():
        ratios = [base / own for base, own in zip(times["bf16, transformers"], found, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([name, f"{sizes[name] / 1e6:.0f}", f"{1 / median(found):.2f}", spread, f"{speed / sizes[name]:.2f}"])
    header = ["weights", "MB a token", "tokens a second", "ratio to bf16", "bound by memory, tokens a second"]
    about = f"{shape.parameters / 1e6:.0f} million parameters, {options.layers} layers; memory {speed / 1e9:.1f} GB/s"
    text = f"{about}; {machine(options.threads)}\n\n{table(header, rows)}"
    write(options.out, "decode", text, {"seconds": times, "bytes": sizes, "bandwidth": speed})


if __name__ == "__main__":
    main()
