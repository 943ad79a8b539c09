"""What a run will take, told before any work: memory, disk, size and time; and a rehearsal on two blocks."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from assay.budget.plans import Outlook
from assay.engines import write
from assay.engines.contract import Contract
from assay.measure.stream import BATCH_TOKENS, LOGITS_AT_ONCE, StreamedModel
from assay.model import memory
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.progress import COMPRESSING, PRICING, REHEARSING, SAVING, SWEEPS
from assay.model.sites import Site
from assay.model.threads import at_once
from assay.profiling import WINDOW, Scope, window_length

IDLE = 460_000_000
"""Resident bytes once everything is imported (benchmarks/memory.py)."""
DEPTH_GROWTH = 0.10
"""What each doubling of the depth adds to the memory over idle (benchmarks/memory.py)."""
REHEARSED_BLOCKS, REHEARSED_TOKENS = 2, 4096
LEAST_BITS = 4.3
"""What every engine can be asked for."""
ROOM_PER_SITE = 800
POLISHED_ITEMSIZE = 24
LOGITS_COPIES = 9
"""Tensors of the size of the logits that scoring two models holds at once: 150 MB where one has 17."""
SPARE = 0.9
"""Share of the free memory that a run may plan for."""
Compress = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Handling:
    """How a text goes through a model. batch: tokens at once; need: bytes of memory that this takes, roughly; said: what
    was lowered for lack of memory, or what doesn't fit even so, else ""."""

    batch: int
    need: int
    said: str = ""


def handling(model: StreamedModel, window: int | None, free: int | None) -> Handling:
    """The largest batch, of one window at least, whose memory fits `free` bytes (None: not known)."""
    window = window_length(model, window)
    batch = most = max(BATCH_TOKENS, window)
    while free is not None and batch > window and memory_needed(model, batch, window) > SPARE * free:
        batch = max(window, batch // 2)
    need = memory_needed(model, batch, window)
    if free is None or (batch == most and need <= free):
        return Handling(batch, need)
    said = f"{free / 1e9:.1f} GB of memory free: {batch} tokens at once instead of {most}" if batch < most else ""
    if need > free:
        short = f"about {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; a shorter --window needs less"
        said = f"{said}; {short}" if said else short
    return Handling(batch, need, said)


def memory_needed(model: StreamedModel, batch: int, window: int) -> int:
    """Resident bytes that profiling and compressing reach, roughly: the larger of a block's backward step and of solving
    its largest matrix. batch: tokens at once; window: tokens read together."""
    sites = [s for s in model.anatomy.sites.values() if s.block is not None]
    blocks: dict[int, list[Site]] = {}
    for site in sites:
        blocks.setdefault(int(site.block or 0), []).append(site)
    weights = max((sum(s.count for s in own) for own in blocks.values()), default=0)
    widths = max((sum(s.shape[0] + s.shape[1] for s in own if s.expert in (None, 0)) for own in blocks.values()), default=0)
    moments = max((sum(s.shape[0] ** 2 for s in own) + sum(n**2 for n in _inputs(own)) for own in blocks.values()), default=0)
    heads = int(getattr(model.model.config, "num_attention_heads", None) or 1)
    together = at_once() if model.small else 0
    backward = 4 * (weights + (1 + together) * moments + max(1, together) * batch * (2 * widths + heads * window))
    solving = max((40 * (s.shape[0] ** 2 + s.shape[1] ** 2) + 30 * s.count for s in sites), default=0)
    ends = sum(4 * math.prod(model.checkpoint.shape(n)) for n in model.checkpoint.names if n not in _in_blocks(model))
    logits = (at_once() if model.few_logits(window) else 1) * _logits_at_once(model, batch, window)
    return IDLE + max(backward, solving, ends + 4 * LOGITS_COPIES * logits)


def _logits_at_once(model: StreamedModel, batch: int, window: int) -> int:
    """Elements of the largest logits that are in memory together."""
    one = window * model.vocabulary
    return one * max(1, min(batch // window, LOGITS_AT_ONCE // one))


def _inputs(sites: list[Site]) -> list[int]:
    return list({s.reads: s.shape[1] for s in sites}.values())


def _in_blocks(model: StreamedModel) -> set[str]:
    """Stored tensors of all blocks."""
    starts = tuple(f"{name}." for name in model.anatomy.block_names)
    return {n for path, stored in model.anatomy.parameters.items() if path.startswith(starts) for n in stored}


def line(by: Handling, disk: int, nbytes: int) -> str:
    """One line that is said before a run."""
    said = f"{by.said}; " if by.said else ""
    size = f"result about {nbytes / 1e6:,.1f} MB"
    return f"{said}about {by.need / 1e9:.1f} GB of memory, no GPU, {disk / 1e6:,.0f} MB of disk, {size}; --dry-run times it"


def disk_needed(model: StreamedModel, tokens: int, result: int) -> int:
    """Bytes that a run takes at its peak beside the result: hidden states of every depth, then statistics and packed blocks."""
    config = model.model.config.get_text_config(decoder=True)
    width = int(getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or 0)
    states = 4 * tokens * width * (len(model.blocks) + 3)
    sites = list(model.anatomy.sites.values())
    reads = {s.reads: s.shape[1] for s in sites}
    moments = 4 * (sum(n * n for n in reads.values()) + sum(s.shape[0] ** 2 for s in sites if s.block is not None))
    return max(states + moments, moments + 2 * result) + result


@dataclass
class Clock:
    """A Progress that times every step of every task up to saving, and forwards nothing."""

    tasks: list[tuple[str, list[float]]] = field(default_factory=list)
    ended: float = 0.0
    resident: int = 0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        steps: list[float] = []
        last = perf_counter()
        if description == SAVING:
            yield lambda n=1: None
            return

        def advance(n: int = 1) -> None:
            nonlocal last
            now = perf_counter()
            steps.append(now - last)
            last = now

        self.tasks.append((description, steps))
        yield advance
        self.ended, self.resident = perf_counter(), memory.resident()

    def log(self, message: str, **facts: object) -> None:
        return None


def rehearse(
    model: StreamedModel, compress: Compress, budget: Mapping[str, Any], settings: Mapping[str, Any],
    tokens: int, result: int, *, profiled: bool, planned: bool, stays: Sequence[str] | None, near: Path,
) -> dict[str, Any]:  # fmt: skip
    """Compress the first two blocks in a folder that goes again, and say what the whole will take.

    compress: `run.compress`; settings: its further options; result: bytes that the whole is expected to have;
    profiled, planned: whether a profile or a plan is there already; stays: tensors that nothing compresses, where the budget
    counts what lies outside the blocks, else None. Returns seconds, memory and disk, and seconds by stage.
    """
    clock, used = Clock(), min(tokens, REHEARSED_TOKENS)
    with tempfile.TemporaryDirectory(prefix=".assay-rehearsal-", dir=near) as folder:
        copy = Path(folder) / "model"
        short = copy_blocks(model, copy)
        share, inside = _inside_weights(model) / max(1, _inside_weights(short)), _in_blocks(short)
        memory.release()
        memory.forget_peak()
        started = perf_counter()
        like = {"size": _size(short, budget["bits"], stays)} if stays is not None else budget
        done = compress(str(copy), Path(folder) / "out", tokens=used, progress=clock, **settings, **like)
        ended, high = perf_counter(), memory.peak()
        written = Checkpoint.open(Path(folder) / "out")
        header = written.weight_bytes - sum(info.nbytes for info in written.stored.values())
        blocks = sum(len(written.parts(name)) for name in written.names if name in inside)
        entries = 1 + blocks * (share - 1) / max(1, len(written.stored))
    saving = (ended - clock.ended) * max(1.0, result / max(int(done["bytes"]), 1))
    length = int(settings.get("window") or WINDOW)
    scope = Scope((settings["method"],), sparing=True, flat=bool(settings["uniform"] or budget.get("level")))
    every, met = (scope.gradients(model, n // length).every for n in (tokens, used))
    stages = _stages(clock, share, (tokens / used, tokens / used * met / every), profiled, planned)
    other = max(0.0, clock.ended - started - sum(sum(steps) for _, steps in clock.tasks))
    depth = math.log2(max(1.0, len(model.blocks) / REHEARSED_BLOCKS))
    sweeping = IDLE + max(0, high - IDLE) * (1 + DEPTH_GROWTH * depth)
    shard = min(write.SHARD_BYTES, result) - min(write.SHARD_BYTES, int(done["bytes"]))
    return {
        "seconds": sum(stages.values()) + other + saving, "stages": stages | {"saving": saving, "other": other},
        "rehearsal_seconds": ended - started, "memory": int(max(sweeping, clock.resident + shard)),
        "header_bytes": round(header * entries),
    }  # fmt: skip


def _stages(clock: Clock, share: float, more_text: tuple[float, float], profiled: bool, planned: bool) -> dict[str, float]:
    """Seconds of the whole by stage. share: weights of all blocks over those rehearsed; more_text: tokens over those used,
    forwards and backwards."""
    found: dict[str, float] = {}
    more = dict(zip(SWEEPS, more_text, strict=True))
    rounds = sum(name == COMPRESSING for name, _ in clock.tasks)
    compressed = 0
    for name, steps in clock.tasks:
        measuring = compressed == 0 and name != COMPRESSING
        compressed += name == COMPRESSING
        if (measuring and profiled) or (planned and not measuring and (name != COMPRESSING or compressed < rounds)):
            continue
        found[name] = found.get(name, 0.0) + _whole(name, steps, share) * more.get(name, 1.0)
    return found


def _whole(name: str, steps: list[float], share: float) -> float:
    """Seconds of a task over all blocks: the first one as it was, since it warms things up, and the others like the second."""
    outside, blocks = 0.0, steps
    if name == REHEARSING:
        return sum(steps)
    if name in SWEEPS:
        outside, blocks = sum(steps[:1]), steps[1:]
    elif name in (PRICING, COMPRESSING):
        outside, blocks = sum(steps[REHEARSED_BLOCKS:]), steps[:REHEARSED_BLOCKS]
    if len(blocks) < REHEARSED_BLOCKS:
        return outside + sum(blocks) * share
    return outside + blocks[0] + blocks[1] * (REHEARSED_BLOCKS * share - 1)


def copy_blocks(model: StreamedModel, folder: Path) -> StreamedModel:
    """Write a checkpoint of the first two blocks and what lies outside, and open it.

    Raises InputError where a model can't be cut like that.
    """
    source, depth = model.checkpoint, len(model.blocks)
    count = min(depth, REHEARSED_BLOCKS)
    later = tuple(f"{name}." for name in model.anatomy.block_names[count:])
    kept = [n for path, stored in model.anatomy.parameters.items() if not path.startswith(later) for n in stored]
    if not later:
        kept = [n for stored in model.anatomy.parameters.values() for n in stored]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_shortened(source.config, depth, count)))
    write.write_shards(folder, (dict(source.iter_raw(source.parts(n))) for n in dict.fromkeys(kept)))
    write.copy_side_files(folder, source)
    try:
        return StreamedModel(Checkpoint.open(folder))
    except InputError as error:
        raise InputError(f"two blocks of this model can't be rehearsed alone ({error}); run without --dry-run") from None


def _inside_weights(model: StreamedModel) -> int:
    return sum(s.count for s in model.anatomy.sites.values() if s.block is not None)


def _shortened(config: Mapping[str, Any], depth: int, count: int) -> dict[str, Any]:
    """A config of fewer blocks: every count of them, and every list with an entry a block."""
    made: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("config") and name != "quantization_config":
            made[name] = _shortened(value, depth, count)
        elif isinstance(value, list) and len(value) == depth:
            made[name] = value[:count]
        else:
            made[name] = count if isinstance(value, int) and value == depth and "layer" in name else value
    return made


def told(
    model: StreamedModel, contract: Contract, compress: Compress, budget: Mapping[str, Any], settings: Mapping[str, Any],
    ahead: Outlook, tokens: int, by: Handling, *, profiled: bool, planned: bool, polish: float | None, near: Path,
) -> dict[str, Any]:  # fmt: skip
    """All of it for `--dry-run`: bytes of memory, disk and result, seconds and what they rest on. near: where the result goes."""
    tensors = ahead.tensors - _lossless(model, contract, ahead.stays)
    like = _like(model, budget, ahead)
    found = rehearse(model, compress, like, settings, tokens, tensors, profiled=profiled, planned=planned,
                     stays=ahead.stays if budget.get("size") or budget.get("memory") else None, near=near)  # fmt: skip
    nbytes = tensors + found.pop("header_bytes") if contract.layout != "plain" else model.checkpoint.weight_bytes
    if polish is not None:
        found["seconds"] += 60 * polish
        found["memory"] = max(found["memory"], IDLE + POLISHED_ITEMSIZE * sum(s.count for s in model.anatomy.sites.values()))
    facts = found | {
        "bytes": nbytes, "source_bytes": model.checkpoint.weight_bytes, "gpu_memory": 0, "batch_tokens": by.batch,
        "disk": disk_needed(model, 0 if profiled else tokens, nbytes), "tokens": tokens, "said": by.said,
        "basis": f"{min(REHEARSED_BLOCKS, len(model.blocks))} of {len(model.blocks)} blocks on "
                 f"{min(tokens, REHEARSED_TOKENS)} of {tokens} tokens, saved and reopened, "
                 f"in {found['rehearsal_seconds']:.0f} s on this machine",
    }  # fmt: skip
    return facts | {"short": fits(facts, near, memory.available())}


def _lossless(model: StreamedModel, contract: Contract, stays: Sequence[str]) -> int:
    """Bytes that the engine's layout saves on tensors that nothing compresses."""
    if contract.layout != "assay":
        return 0
    return sum(model.checkpoint.kept_nbytes(n) - write.kept_nbytes(model.checkpoint, n, contract) for n in stays)


def _size(model: StreamedModel, bits: float, stays: Sequence[str]) -> int:
    """Bytes of weight files where every matrix but those that stay takes so many bits a weight, with room for headers."""
    kept = set(stays)
    sites = [site for site in model.anatomy.sites.values() if site.name not in kept]
    rest = model.checkpoint.kept_file_bytes - sum(model.checkpoint.kept_nbytes(n) for n in {s.name for s in sites})
    return rest + sum(math.ceil(s.count * bits / 8) for s in sites) + ROOM_PER_SITE * len(model.anatomy.sites)


def _like(model: StreamedModel, budget: Mapping[str, Any], ahead: Outlook) -> dict[str, Any]:
    """The budget for a rehearsal, in which nothing is kept: the bits that are left for what the run will compress."""
    if budget.get("level"):
        return {"level": budget["level"]}
    free = set(model.checkpoint.names) - set(ahead.stays)
    count = sum(math.prod(model.checkpoint.shape(n)) for n in free)
    taken = ahead.tensors - sum(model.checkpoint.kept_nbytes(n) for n in ahead.stays)
    return {"bits": max(LEAST_BITS, 8 * taken / max(count, 1))}


def fits(facts: Mapping[str, Any], folder: Path, free: int | None) -> list[str]:
    """What is too small on this machine, in words."""
    short = []
    if free is not None and facts["memory"] > free:
        short.append(f"{free / 1e9:.1f} GB of memory free where the run needs {facts['memory'] / 1e9:.1f} GB")
    disk = shutil.disk_usage(folder).free
    if facts["disk"] > disk:
        short.append(f"{disk / 1e6:,.0f} MB of disk free where the run needs {facts['disk'] / 1e6:,.0f} MB")
    return short
