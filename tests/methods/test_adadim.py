"""Groups along either axis: the better one is taken, at the same bytes, and comes back from its file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import encode, pebble_block
from torch import Tensor

from assay.methods.base import Statistics, get
from assay.methods.solve.curvature import damage as price
from assay.model.level import Level
from assay.model.packed import PackedAxis
from assay.model.terms import restore


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(level: str, weight: Tensor, h: Tensor | None = None) -> PackedAxis:
    stats = Statistics() if h is None else Statistics(h[None])
    packed = get("adadim")().encode(weight[None], Level.parse(level), torch.bfloat16, stats)[0]
    assert isinstance(packed, PackedAxis)
    return packed


def test_large_weights_on_faint_inputs_spoil_no_other_column() -> None:
    factor = torch.where(torch.arange(128) % 16 == 0, 64.0, 1.0)
    weight, h = normal(0, 64, 128), torch.eye(128)
    plain, loud = made("axis3-g64-asym", weight, h), made("axis3-g64-asym", weight * factor, torch.diag(factor**-2))
    assert loud.by_input
    other = get("gptq")().encode((weight * factor)[None], Level.parse("int3-g64-asym"), torch.bfloat16, Statistics(h[None]))[0]
    errors = [(p.decode().float() / factor - weight).square().mean() for p in (loud, other)]
    assert errors[0] < 0.2 * errors[1] and errors[0] < 1.1 * (plain.decode().float() - weight).square().mean()


@pytest.mark.parametrize(("level", "share"), [("axis3-g64-asym", 0.95), ("axis4-g64-asym", 0.97)])
def test_never_worse_than_gptq_at_the_outputs_and_better_on_the_whole(level: str, share: float) -> None:
    total, baseline = 0.0, 0.0
    for weight, curvature in pebble_block().values():
        packed = encode("adadim", level, weight, curvature)
        assert isinstance(packed, PackedAxis)
        plain = encode("gptq", level.replace("axis", "int"), weight, curvature)
        loss, other = (float(price(p.decode().float() - weight, curvature.h)) for p in (packed, plain))
        assert loss < other if packed.by_input else loss == other
        total, baseline = total + loss, baseline + other
    assert total < share * baseline


@settings(max_examples=30, database=None)
@given(st.sampled_from([8, 24, 64, 96]), st.sampled_from([64, 128, 192]), st.sampled_from([2, 3, 4, 8]),
       st.sampled_from([32, 64, None]), st.booleans(), st.integers(0, 99))  # fmt: skip
def test_any_shape_comes_back_and_is_counted(
    rows: int, columns: int, bits: int, group: int | None, symmetric: bool, seed: int
) -> None:
    level = Level(bits, group, symmetric, "axis")
    packed = made(level.name, normal(seed, rows, columns))
    stored = packed.tensors()
    again = restore(stored, level, torch.bfloat16)
    assert torch.equal(again.decode(), packed.decode()) and packed.decode().shape == (rows, columns)
    assert packed.nbytes == sum(t.nbytes for t in stored.values()) == level.nbytes(rows, columns)
    assert stored["weight_shape"].tolist() == [rows, columns]
