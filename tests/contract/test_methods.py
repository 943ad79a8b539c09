"""What every file of the methods folder must do, whatever is special about it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from assay.methods import base
from assay.methods.base import EarlyEncoder, Statistics
from assay.model.ggml import KINDS
from assay.model.level import Level
from assay.model.packed import Packed
from assay.model.terms import restore

INTEGERS = ("int2-g32-asym", "int3-g64-sym", "int4-g128-asym", "int5-channel-sym", "int8-channel-asym")
BATCH, ROWS, COLUMNS = 2, 24, 128
FIELDS = {"H": "h", "G": "g", "gradient": "gradient", "fisher": "fisher"}


def levels(name: str) -> list[Level]:
    """The first and the last level of every format and group size that a method offers, and some integers."""
    offered = base.get(name)().levels(COLUMNS)
    found: dict[tuple[str, int | None], list[Level]] = {}
    for level in offered:
        found.setdefault((level.format, level.group_size), []).append(level)
    ends = {x for group in found.values() for x in (min(group), max(group))}
    zero_points = {x.symmetric for x in offered if x.format == "int"}
    return sorted(ends | {x for x in map(Level.parse, INTEGERS) if x.symmetric in zero_points})


def of_width(name: str, bits: float) -> Level:
    """The offered level nearest to a width, with groups of 64 if there are."""
    return min(base.get(name)().levels(COLUMNS), key=lambda x: (abs(x.bits - bits), abs((x.group_size or 999) - 64), x))


def tolerated(level: Level) -> float:
    """The relative squared error that no method may pass at a level."""
    return 1.0 if level.bits <= 2 else 0.3 if level.bits < 4 else 0.05


CASES = [(name, level.name) for name in base.names() for level in levels(name)]


def moment(batch: int, size: int, seed: int) -> Tensor:
    x = torch.randn(batch, 4 * size, size, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.2, 2, size)
    return x.mT @ x / x.shape[1]


def problem() -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(BATCH, ROWS, COLUMNS, generator=generator).bfloat16().float() * 0.0625
    gradient = torch.randn(weight.shape, generator=generator) * 1e-3
    fisher = torch.randn(weight.shape, generator=generator).square() * 1e-6
    return weight, Statistics(moment(BATCH, COLUMNS, 4), moment(BATCH, ROWS, 5), gradient, fisher)


def part(stats: Statistics, index: int) -> Statistics:
    return Statistics(*(m[index : index + 1] for m in (stats.h, stats.g, stats.gradient, stats.fisher) if m is not None))


def encode(name: str, level: Level, weight: Tensor, stats: Statistics) -> list[Packed]:
    method = base.get(name)
    wanted = Statistics(**{FIELDS[need]: getattr(stats, FIELDS[need]) for need in method.needs})
    return method().encode(weight, level, torch.bfloat16, wanted)


@pytest.mark.parametrize("name", base.names())
def test_a_method_states_its_facts(name: str) -> None:
    method = base.get(name)
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert method.verb in {"score", "encode", "combine", "attach", "train"}
    assert set(method.needs) <= FIELDS.keys()
    assert method.prices in {"nearest", "gptq", "two_sided"}
    assert method.paper
    assert method.__doc__
    assert method() == method()
    offered = method().levels(COLUMNS)
    assert offered and {x.format for x in offered} <= set(method.formats)
    assert len(set(offered)) == len(offered)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_a_method_encodes_at_the_level_asked_for(name: str, level: str) -> None:
    wanted = Level.parse(level)
    weight, stats = problem()
    before = [weight.clone(), *(getattr(stats, f).clone() for f in FIELDS.values())]
    packed = encode(name, wanted, weight, stats)
    after = [weight, *(getattr(stats, f) for f in FIELDS.values())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "the inputs were changed"
    assert [p.level for p in packed] == [wanted] * BATCH
    for result, source in zip(packed, weight, strict=True):
        stored = result.tensors()
        assert result.nbytes == wanted.nbytes(ROWS, COLUMNS) == sum(t.nbytes for t in stored.values())
        assert all(t.is_contiguous() for t in stored.values())
        decoded = result.decode()
        assert decoded.dtype is (torch.float32 if wanted.format in KINDS else torch.bfloat16)
        assert torch.equal(restore(stored, wanted, torch.bfloat16).decode(), decoded)
        assert (decoded.float() - source).square().mean() < tolerated(wanted) * source.square().mean()


@pytest.mark.parametrize("name", base.names())
def test_a_second_call_and_a_batch_of_one_give_the_same_bits(name: str) -> None:
    level = of_width(name, 3)
    weight, stats = problem()
    batch, again = encode(name, level, weight, stats), encode(name, level, weight, stats)
    alone = [encode(name, level, weight[i : i + 1], part(stats, i))[0] for i in range(BATCH)]
    for a, b, c in zip(batch, again, alone, strict=True):
        assert torch.equal(a.decode(), b.decode())
        step = float(weight.abs().max()) / 2 ** (level.bits - 1)
        torch.testing.assert_close(a.decode().float(), c.decode().float(), rtol=0, atol=1.5 * step)


@pytest.mark.parametrize("name", [name for name in base.names() if isinstance(base.get(name)(), EarlyEncoder)])
def test_beginning_early_gives_the_same_bits(name: str) -> None:
    weight, stats = problem()
    method, level = base.get(name)(), of_width(name, 3)
    pairs = (encode(name, level, weight, s) for s in (stats, method.begin(stats)))
    assert all(torch.equal(a.decode(), b.decode()) for a, b in zip(*pairs, strict=True))
    assert method.begin(Statistics()) == Statistics()


@pytest.mark.parametrize("name", base.names())
def test_a_method_survives_matrices_of_zeros_and_statistics_of_low_rank(name: str) -> None:
    level = of_width(name, 4)
    weight, none = torch.zeros(1, ROWS, COLUMNS), torch.zeros(1, ROWS, COLUMNS)
    stats = Statistics(torch.ones(1, COLUMNS, COLUMNS), torch.ones(1, ROWS, ROWS), none, none)
    assert not encode(name, level, weight, stats)[0].decode().any()
    weight[0, 0, 0] = 1.0
    assert torch.isfinite(encode(name, level, weight, stats)[0].decode()).all()


@pytest.mark.parametrize("name", base.names())
def test_a_method_does_without_statistics(name: str) -> None:
    level = of_width(name, 4)
    weight, _ = problem()
    packed = base.get(name)().encode(weight, level, torch.bfloat16, Statistics())
    for result, source in zip(packed, weight, strict=True):
        assert (result.decode().float() - source).square().mean() < tolerated(level) * source.square().mean()
