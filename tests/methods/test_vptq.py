"""Vector codebooks: k-means that never gets worse, GPTQ as a special case, sizes that add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import damage, encode, pebble_block

from assay.methods.base import Statistics, get
from assay.methods.grid.base import Affine
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import vectors
from assay.methods.solve.curvature import damage as price
from assay.methods.solve.curvature import damp, shrink
from assay.methods.solve.feedback import column_feedback
from assay.methods.solve.gptq import FixedGrid
from assay.methods.solve.ordered import Order
from assay.model.level import STAGES, Level
from assay.model.terms import PackedSum
from assay.model.vectors import PackedVectors


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, size: int) -> torch.Tensor:
    x = normal(seed, 3 * size, size) @ (normal(seed + 1, size, size) / size**0.5 + torch.eye(size))
    return (x.mT @ x / len(x))[None]


def test_the_objective_of_k_means_never_rises() -> None:
    points, importance = normal(0, 2000, 4), normal(1, 2000).exp()
    table, before = points[:16], float("inf")
    for _ in range(60):
        table, objective = vectors.improve(points, importance, table)
        assert objective <= before * (1 + 1e-6)
        before = objective
    found = vectors.improve(points, importance, vectors.k_means(points, importance, 16))[1]
    assert found < 1.05 * before


def test_as_many_centroids_as_points_cost_nothing() -> None:
    points = normal(2, 16, 4)
    assert vectors.improve(points, torch.ones(16), vectors.k_means(points, torch.ones(16), 16))[1] < 1e-8
    codes = vectors.nearest(normal(3, 500, 4), points)
    assert torch.equal(codes, torch.cdist(normal(3, 500, 4), points).argmin(-1))


def test_a_few_quiet_outputs_do_not_stand_for_all() -> None:
    weight = normal(10, 1, 1024, 1024)
    weight[:, :4] *= 0.1
    packed = get("vptq")().encode(weight, Level(1, None, True, "vector"), torch.bfloat16, Statistics())[0]
    # 0.37 as with all outputs alike; 0.82 from codebooks of the quiet ones
    assert (packed.decode().float() - weight[0]).square().sum() < 0.4 * weight.square().sum()


def test_vectors_of_one_weight_on_an_even_table_are_gptq() -> None:
    weight, H = normal(4, 1, 24, 48), moment(5, 48)
    order = Order.of(weight, H)
    assert order.factor is not None
    grid = IntegerGrid(3, None, False, torch.float32)
    affine = Affine(torch.full((1, 24, 1), 0.7), torch.full((1, 24, 1), 4, dtype=torch.uint8))
    scalar = FixedGrid(grid, affine, order.visit)
    frame = vectors.Frame(torch.zeros(1, 48), torch.ones(1, 48))
    table = ((torch.arange(8.0) - 4) * 0.7)[None, :, None]
    vector = vectors.VectorQuantizer(order, frame, [table], 24)
    for quantizer in (scalar, vector):
        order.feed(weight, quantizer)
    assert torch.equal(scalar.codes, vector.codes[0])


def test_squared_errors_sum_to_the_price() -> None:
    weight, H = normal(7, 1, 16, 40), moment(8, 40)
    order = Order.of(weight, H)
    assert order.factor is not None
    found = vectors.solve(weight, order, (4, 4), 4, torch.float32)
    quantizer = vectors.VectorQuantizer(order, found.frame, found.tables, 16)
    errors = column_feedback(order.taken(weight), order.factor, quantizer)
    packed = get("vptq")().encode(weight, Level(2, None, True, "vector"), torch.float32, Statistics(H))[0]
    assert isinstance(packed, PackedVectors)
    decoded = PackedVectors(packed.level, tuple(c[0] for c in found.codes), tuple(t[0] for t in found.tables),
                            found.frame.low[0], found.frame.span[0], 16).decode()  # fmt: skip
    metric = damp(shrink(H, 0.02), 0.01)
    torch.testing.assert_close(2 * price(weight - decoded, metric), errors.square().sum((1, 2)), rtol=1e-3, atol=1e-5)


@settings(max_examples=25, database=None)
@given(st.integers(1, 13), st.integers(1, 40), st.sampled_from(sorted(STAGES)), st.integers(0, 99))
def test_any_shape_comes_back_and_is_counted(rows: int, columns: int, bits: float, seed: int) -> None:
    level = Level(bits, None, True, "vector")
    packed = get("vptq")().encode(normal(seed, 1, rows, columns), level, torch.bfloat16, Statistics())[0]
    stored = packed.tensors()
    again = PackedVectors.from_tensors(stored, level)
    assert torch.equal(again.decode(), packed.decode()) and packed.decode().shape == (rows, columns)
    assert packed.nbytes == sum(t.nbytes for t in stored.values()) == level.nbytes(rows, columns)


@pytest.mark.parametrize("bits", [1, 1.5, 2.5])
def test_on_real_weights_feedback_pays(bits: float) -> None:
    with_feedback, without = 0.0, 0.0
    level = Level(bits, None, True, "vector")
    for weight, curvature in pebble_block().values():
        plain = get("vptq")().encode(weight[None], level, torch.bfloat16, Statistics())[0]
        without += curvature.damage(plain.decode().float() - weight)
        with_feedback += curvature.damage(encode("vptq", level.name, weight, curvature).decode().float() - weight)
    assert with_feedback < 0.6 * without


def test_on_real_weights_vectors_beat_scalars_at_two_bits() -> None:
    # 2.31 bits with the codebooks; the scalars with scales a group have 2.28
    assert damage("vptq", "vector2-channel") < 0.8 * damage("gptq", "int2-g64-asym")


def test_outlier_columns_are_the_loudest_and_exact() -> None:
    level = Level.parse("vector1-channel+sparse0.01")
    for weight, curvature in list(pebble_block().values())[:2]:
        packed = encode("vptq", level.name, weight, curvature)
        assert isinstance(packed, PackedSum) and packed.exact is not None
        mask = packed.exact.mask(weight.shape)
        whole = curvature.h.diagonal().argsort(descending=True)[: level.kept(*weight.shape) // len(weight)]
        assert mask.sum() == level.kept(*weight.shape) and mask[:, whole].all() and mask.any(0).sum() <= len(whole) + 1
        # nothing was quantized before the loudest columns, so they are still the weights themselves
        assert torch.equal(packed.decode()[:, whole].float(), weight[:, whole].bfloat16().float())
    assert damage("vptq", level.name) < damage("vptq", level.base.name)
