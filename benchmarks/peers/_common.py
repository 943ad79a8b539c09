"""What every peer script does besides calling its peer: arguments, loading, clocks, results.

Runs under each peer's own python, so it may use torch, transformers and numpy and nothing else.
No file here may bear the name of a package: it would be found in that package's place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Width = tuple[int, int]
"""Bits of a weight and the size of its groups."""


@dataclass(frozen=True)
class Job:
    """What a peer is asked for. `calibration`: .npy file of int64 token ids [windows, length]."""

    model: Path
    calibration: Path
    bits: int
    group_size: int
    out: Path
    threads: int

    def ids(self) -> Tensor:
        """Calibration token ids, int64 [windows, length]."""
        return torch.from_numpy(np.load(self.calibration))

    def batches(self) -> list[Tensor]:
        """Calibration windows one at a time, int64 [1, length] each."""
        return list(self.ids().split(1))

    def load(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """The model, by default in the dtype it is stored in."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()


def parser(description: str) -> argparse.ArgumentParser:
    """The command line that all peers share; a script may add its own options."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    found.add_argument("--calibration", type=Path, required=True, help="ids [windows, length]")
    found.add_argument("--bits", type=int, required=True)
    found.add_argument("--group-size", type=int, default=64)
    found.add_argument("--out", type=Path, required=True, help="folder for the plain checkpoint")
    found.add_argument("--threads", type=int, default=1)
    return found


def read_job(given: argparse.Namespace) -> Job:
    """The job on the command line, with torch set to its threads and seeded."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    return Job(**{field.name: getattr(given, field.name) for field in fields(Job)})


class Clock:
    """Seconds of wall time, of the quantization alone and of the whole script."""

    def __init__(self) -> None:
        self.quantization = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside towards the quantization."""
        start = time.perf_counter()
        yield
        self.quantization += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since this process began, imports and loading included."""
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer inside the transformer blocks, by name."""
    inside = re.compile(r"\.\d+\.")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and inside.search(name)
    }


def bits_in_blocks(job: Job, bits_per_group: float) -> float:
    """Mean bits per weight of the blocks' linears: codes, and `bits_per_group` for each group."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    stored = weights = 0.0
    for linear in block_linears(skeleton).values():
        groups = linear.out_features * -(-linear.in_features // job.group_size)
        count = linear.out_features * linear.in_features
        stored += count * job.bits + groups * bits_per_group
        weights += count
    return stored / weights


def peak_rss() -> int:
    """Most resident bytes this process had.

    VmHWM and not getrusage's ru_maxrss, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def finish(
    job: Job,
    clock: Clock,
    peer: tuple[str, str],
    bits: float,
    model: nn.Module,
    decoded: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the plain checkpoint and `result.json` (see `write_result`).

    peer: name and version. bits: what `bits_in_blocks` gives. `decoded` holds the values of block
    linears, by layer name, where the peer keeps something else than a weight in its model.
    """
    memory = peak_rss()
    plain = job.load(torch.float32)
    found = model.state_dict() | {f"{name}.weight": w for name, w in (decoded or {}).items()}
    state = {name: found[name].float() for name in plain.state_dict()}
    names = [f"{name}.weight" for name in block_linears(plain)]
    check(plain, state, dict.fromkeys(names, (job.bits, job.group_size)))
    plain.load_state_dict(state)
    facts = {"peer": peer[0], "version": peer[1], "bits_in_blocks": bits}
    write_result(job, clock, memory, **facts, dtype=save_plain(job, plain))


def check(original: nn.Module, state: Mapping[str, Tensor], widths: Mapping[str, Width]) -> None:
    """Raise unless tensors in `widths` have few enough values a group and other matrices stayed."""
    for name, before in original.state_dict().items():
        after = state[name]
        if name in widths:
            bits, group_size = widths[name]
            if most_values(after, group_size) > 1 << bits:
                raise RuntimeError(f"{name} was not quantized to {bits} bits")
        elif before.ndim == 2 and not before.float().equal(after.float()):
            raise RuntimeError(f"{name} should have stayed as it was")


def most_values(weight: Tensor, group_size: int) -> int:
    """Most distinct values in any group of `group_size` inputs of a weight [out, in]."""
    ordered = weight.float().reshape(-1, group_size).sort(dim=1).values
    return 1 + int(ordered.diff(dim=1).ne(0).sum(dim=1).max())


def save_plain(job: Job, model: PreTrainedModel) -> str:
    """Save a float32 model in the source's dtype if that loses nothing, else in float32.

    Returns the name of the dtype used.
    """
    source = job.load().dtype
    exact = all(t.equal(t.to(source).float()) for t in model.state_dict().values())
    dtype = source if exact else torch.float32
    model.to(dtype).save_pretrained(job.out)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)
    return str(dtype).removeprefix("torch.")


def write_result(job: Job, clock: Clock, memory: int, **facts: Any) -> None:
    """Write `result.json` beside the checkpoint.

    seconds: wall time of the quantization alone; seconds_total: with imports, loading and saving;
    peak_rss_bytes: most resident memory up to the end of the quantization.
    """
    result = facts | {
        "bits": job.bits,
        "group_size": job.group_size,
        "threads": job.threads,
        "seconds": clock.quantization,
        "seconds_total": clock.total,
        "peak_rss_bytes": memory,
    }
    (job.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
