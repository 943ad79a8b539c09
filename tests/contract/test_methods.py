"""What every file of the methods folder must do, whatever is special about it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from assay.methods import base
from assay.model.level import Level
from assay.model.packed import PackedInteger

LEVELS = ("int2-g32-asym", "int3-g64-sym", "int4-g128-asym", "int5-channel-sym", "int8-channel-asym")
BATCH, ROWS, COLUMNS = 2, 24, 128


def moment(batch: int, size: int, seed: int) -> Tensor:
    x = torch.randn(batch, 4 * size, size, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.2, 2, size)
    return x.mT @ x / x.shape[1]


def problem() -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(BATCH, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.05
    return weight, moment(BATCH, COLUMNS, 4), moment(BATCH, ROWS, 5)


def encode(name: str, level: Level, weight: Tensor, h: Tensor, g: Tensor) -> list[PackedInteger]:
    method = base.get(name)
    stats = base.Statistics(h if "H" in method.needs else None, g if "G" in method.needs else None)
    return method().encode(weight, level, torch.bfloat16, stats)


@pytest.mark.parametrize("name", base.names())
def test_a_method_states_its_facts(name: str) -> None:
    method = base.get(name)
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert method.verb in {"score", "encode", "combine", "attach", "train"}
    assert set(method.needs) <= {"H", "G"}
    assert method.prices in base.names()
    assert method.paper
    assert method.__doc__
    assert method() == method()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", base.names())
def test_a_method_encodes_at_the_level_asked_for(name: str, level: str) -> None:
    wanted = Level.parse(level)
    weight, h, g = problem()
    before = [t.clone() for t in (weight, h, g)]
    packed = encode(name, wanted, weight, h, g)
    assert all(torch.equal(a, b) for a, b in zip((weight, h, g), before, strict=True)), "the inputs were changed"
    assert [p.level for p in packed] == [wanted] * BATCH
    for result, source in zip(packed, weight, strict=True):
        assert result.scale.dtype is torch.bfloat16
        assert int(result.codes.max()) < 1 << wanted.bits
        assert result.nbytes == wanted.nbytes(ROWS, COLUMNS) == sum(t.nbytes for t in result.tensors().values())
        again = PackedInteger.from_tensors(result.tensors(), wanted)
        assert torch.equal(again.decode(), result.decode())
        error = (result.decode().float() - source).square().mean() / source.square().mean()
        assert error < (1.0 if wanted.bits == 2 else 0.3 if wanted.bits == 3 else 0.05)


@pytest.mark.parametrize("name", base.names())
def test_a_second_call_and_a_batch_of_one_give_the_same_bits(name: str) -> None:
    level = Level(3, 64, False)
    weight, h, g = problem()
    batch, again = encode(name, level, weight, h, g), encode(name, level, weight, h, g)
    alone = [encode(name, level, weight[i : i + 1], h[i : i + 1], g[i : i + 1])[0] for i in range(BATCH)]
    for a, b, c in zip(batch, again, alone, strict=True):
        assert torch.equal(a.decode(), b.decode())
        torch.testing.assert_close(a.decode().float(), c.decode().float(), rtol=0, atol=float(a.scale.float().max()) * 1.5)


@pytest.mark.parametrize("name", base.names())
def test_a_method_survives_matrices_of_zeros_and_statistics_of_low_rank(name: str) -> None:
    level = Level(4, 64, False)
    weight = torch.zeros(1, ROWS, COLUMNS)
    low_rank = torch.ones(1, COLUMNS, COLUMNS)
    packed = encode(name, level, weight, low_rank, torch.ones(1, ROWS, ROWS))
    assert not packed[0].decode().any()
    weight[0, 0, 0] = 1.0
    assert torch.isfinite(encode(name, level, weight, low_rank, torch.ones(1, ROWS, ROWS))[0].decode()).all()
