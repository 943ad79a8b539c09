"""Error feedback with exact weights and with tables a row."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from measured import damage

from assay.methods.base import Statistics, get
from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import codebook
from assay.methods.solve.gptq import FixedGrid
from assay.methods.solve.kept import Kept
from assay.methods.solve.ordered import Order
from assay.model.level import Level
from assay.model.terms import PackedSum


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, size: int) -> torch.Tensor:
    x = normal(seed, 3 * size, size) @ (normal(seed + 1, size, size) / size**0.5 + torch.eye(size))
    return (x.mT @ x / len(x))[None]


def test_nothing_kept_is_gptq_and_everything_kept_is_exact() -> None:
    weight, H = normal(0, 1, 24, 64).bfloat16().float(), moment(1, 64)
    level = Level.parse("int3-g32-asym")
    plain = get("gptq")().encode(weight, level, torch.bfloat16, Statistics(H))[0]
    assert torch.equal(get("sparse_gptq")().encode(weight, level, torch.bfloat16, Statistics(H))[0].decode(), plain.decode())
    order, grid = Order.of(weight, H), IntegerGrid(3, 32, False)
    quantizer = Kept(
        FixedGrid(grid, grid.fit(weight), order.visit), order, torch.ones_like(weight, dtype=torch.bool), torch.bfloat16
    )
    order.feed(weight, quantizer)
    assert torch.equal(order.restored(quantizer.values.mT), weight)


@pytest.mark.parametrize("score", ["deviation", "sensitivity", "columns"])
def test_as_many_weights_are_kept_as_the_level_says(score: str) -> None:
    weight, H = normal(2, 2, 24, 64), torch.cat([moment(3, 64), moment(5, 64)])
    level = Level.parse("int3-g32-asym+sparse0.05")
    for packed in get("sparse_gptq")(score=score).encode(weight, level, torch.bfloat16, Statistics(H)):
        assert isinstance(packed, PackedSum) and packed.exact is not None
        assert len(packed.exact.values) == level.kept(24, 64) == 77
        if score == "columns":
            whole = packed.exact.mask(weight.shape[1:]).sum(0)
            assert sorted(whole.tolist())[-4:] == [5, 24, 24, 24]


@settings(max_examples=30, database=None)
@given(st.integers(1, 4), st.integers(2, 70), st.floats(0, 0.49), st.sampled_from(["easy_quant", "sparse_gptq", "gwq"]))
@example(1, 64, 0.0045, "easy_quant")
def test_bytes_are_counted_however_few_are_kept(rows: int, columns: int, share: float, method: str) -> None:
    level = Level(3, None, True, sparse=share)
    packed = get(method)().encode(normal(10, 1, rows, columns), level, torch.bfloat16, Statistics())[0]
    assert packed.nbytes == level.nbytes(rows, columns) == sum(t.nbytes for t in packed.tensors().values())


def test_a_table_of_even_steps_is_gptq() -> None:
    weight, H = normal(7, 1, 16, 48), moment(8, 48)
    order, grid = Order.of(weight, H), IntegerGrid(3, None, False, torch.float32)
    affine = Affine(normal(9, 1, 16, 1).abs() + 0.5, torch.full((1, 16, 1), 3, dtype=torch.uint8))
    scalar = FixedGrid(grid, affine, order.visit)
    tables = codebook.RowTables((torch.arange(8.0) - 3) * affine.scale, 48)
    for quantizer in (scalar, tables):
        order.feed(weight, quantizer)
    assert torch.equal(scalar.codes, tables.codes)


def test_on_real_weights_feedback_pays_with_tables_and_with_exact_weights() -> None:
    for bits in (4, 3, 2):
        tables, even = damage("lut_gptq", f"lut{bits}-channel"), damage("gptq", f"int{bits}-channel-asym")
        assert tables < 0.5 * damage("squeezellm", f"lut{bits}-channel") and tables < 0.9 * even
        assert damage("lut_gptq", f"lut{bits}-channel+sparse0.005") < tables
        kept = {s: damage("sparse_gptq", f"int{bits}-channel-asym+sparse0.005", score=s) for s in ("deviation", "columns")}
        assert kept["deviation"] < kept["columns"] < even
