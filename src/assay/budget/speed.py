"""Speed as a budget: how long this machine takes for the matrix-vector products of one token, by level and shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from assay.budget.menu import Decision, Option, SiteRow
from assay.model.errors import InputError
from assay.model.files import read_json, save_json
from assay.model.level import Level
from assay.model.schema import Shape as ShapeList
from assay.model.schema import conform

Shape = tuple[int, int]
Planner = Callable[[Sequence[Decision], int], list[int]]
REPEATS, SECONDS, NANOSECONDS = 7, 0.01, 10**9
KEPT = "keep"


class _Timed(TypedDict):
    level: str
    shape: ShapeList
    seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _Table(TypedDict):
    machine: str
    rows: list[_Timed]


@dataclass(frozen=True)
class Speeds:
    """Measured seconds of y = W x in bf16 for one token, by level name ("keep": bf16 weights) and shape [out, in].

    Levels that torch has no kernel for on this machine aren't in it: they are decoded first and run like "keep".
    """

    seconds: Mapping[tuple[str, Shape], float]
    machine: str

    def save(self, path: Path) -> None:
        """Write the table durably, as JSON."""
        rows = [{"level": level, "shape": list(shape), "seconds": s} for (level, shape), s in sorted(self.seconds.items())]
        save_json(path, {"assay": "speeds", "machine": self.machine, "rows": rows})

    @classmethod
    def load(cls, path: str | Path) -> Speeds:
        """Raises InputError for anything that `save` didn't write."""
        value = read_json(Path(path), "no table of speeds; assay benchmark writes one")
        conform(value, _Table, f"{path}: not a table of speeds; assay benchmark writes one")
        return cls({(r["level"], (r["shape"][0], r["shape"][1])): r["seconds"] for r in value["rows"]}, value["machine"])

    def time(self, level: str | None, shape: Shape) -> float:
        """Seconds of one product. Raises InputError for a shape that was not measured."""
        kept = self.seconds.get((KEPT, shape))
        if kept is None:
            raise InputError(
                f"the table of speeds lacks matrices of {shape[0]} x {shape[1]}; run assay benchmark on this profile"
            )
        return self.seconds.get((level, shape), kept) if level else kept

    def plan(self, decisions: Sequence[Decision], shapes: Mapping[str, Shape], milliseconds: float, divide: Planner) -> list[int]:
        """Options with the least damage whose products take at most so long for a token.

        The planner sees nanoseconds where it otherwise sees bytes. Raises InputError with the range that can be had.
        """
        taken = [[sum(self.time(o.level, shapes[s]) for s in d.sites) for o in d.options] for d in decisions]
        timed = [_timed(d, times) for d, times in zip(decisions, taken, strict=True)]
        limit = int(milliseconds / 1000 * NANOSECONDS)
        low, high = (sum(d.options[i].nbytes for d in timed) for i in (0, -1))
        if limit < low:
            reach = (
                f"{low / 1e6:.3f} to {high / 1e6:.3f} ms ({NANOSECONDS / high:.1f} to {NANOSECONDS / low:.1f} tokens per second)"
            )
            raise InputError(f"{milliseconds:g} ms a token are out of reach; this model, engine and machine allow {reach}")
        picked = divide(timed, limit)
        return [
            next(i for i, o in enumerate(d.options) if o.level == t.options[c].level)
            for d, t, c in zip(decisions, timed, picked, strict=True)
        ]

    def milliseconds(self, levels: Mapping[str, str | None], shapes: Mapping[str, Shape]) -> float:
        """Time of one token's products in a plan, by site."""
        return 1000 * sum(self.time(level, shapes[site]) for site, level in levels.items())


def _timed(decision: Decision, seconds: Sequence[float]) -> Decision:
    """A decision whose options cost nanoseconds: the ones that nothing faster beats, and by rising time."""
    costed = [Option(o.level, max(1, round(s * NANOSECONDS)), o.damage) for o, s in zip(decision.options, seconds, strict=True)]
    useful: list[Option] = []
    for option in sorted(costed, key=lambda o: (o.nbytes, o.damage)):
        if not useful or option.damage < useful[-1].damage:
            useful.append(option)
    return dataclasses.replace(decision, options=tuple(useful))


def benchmark(rows: Sequence[SiteRow], levels: Sequence[Level]) -> Speeds:
    """Measure every shape in bf16 and at each level that torch has a kernel for here. Minutes at most, one token at a time."""
    found: dict[tuple[str, Shape], float] = {}
    for shape in sorted({row.shape for row in rows if row.role != "embedding"}):
        found[KEPT, shape] = _seconds(_bf16(shape))
        for level in levels:
            if (kernel := _kernel(level, shape)) is not None:
                found[level.name, shape] = _seconds(kernel)
    found |= {(KEPT, row.shape): 0.0 for row in rows if row.role == "embedding" and (KEPT, row.shape) not in found}
    return Speeds(
        found, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )


def _seconds(run: Callable[[], Any]) -> float:
    """Median time of a call, over batches of calls of some milliseconds each."""
    run()
    started = perf_counter()
    run()
    count = max(1, int(SECONDS / max(perf_counter() - started, 1e-7)))
    times = []
    for _ in range(REPEATS):
        started = perf_counter()
        for _ in range(count):
            run()
        times.append((perf_counter() - started) / count)
    return median(times)


def _vector(columns: int) -> Tensor:
    return torch.ones(1, columns, dtype=torch.bfloat16)


def _bf16(shape: Shape) -> Callable[[], Tensor]:
    x, weight = _vector(shape[1]), torch.ones(shape, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, weight)


def _kernel(level: Level, shape: Shape) -> Callable[[], Tensor] | None:
    """One product of packed integers by torch's own kernel; None where it has none for that."""
    rows, columns = shape
    if level.format != "int" or level != level.base:
        return None
    ops, x = torch.ops.aten, _vector(columns)
    if level.bits == 8 and level.group_size is None and level.symmetric:
        codes8, scale = torch.ones(shape, dtype=torch.int8), torch.ones(rows, dtype=torch.bfloat16)
        return lambda: ops._weight_int8pack_mm(x, codes8, scale)
    if level.bits == 4 and level.group_size in (32, 64, 128) and rows % 16 == 0 and columns % level.group_size == 0:
        size = level.group_size
        packed = ops._convert_weight_to_int4pack_for_cpu(torch.ones(shape, dtype=torch.int32), 1)
        scales = torch.ones(columns // size, rows, 2, dtype=torch.bfloat16)
        return lambda: ops._weight_int4pack_mm_for_cpu(x, packed, size, scales)
    return None
