"""Binary grids, PB-LLM's split of signs and bytes, and D2MoE's planes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured import damage, encode, pebble_block

from assay.methods.base import Statistics, get
from assay.methods.solve.binary import fit, plane, salient_and_signs
from assay.methods.solve.curvature import damage as price
from assay.methods.solve.curvature import damp, shrink
from assay.methods.solve.ordered import Order
from assay.methods.split.scores import sensitivity, split
from assay.model.binary import PackedPlanes, PackedSalient
from assay.model.level import Level


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, size: int) -> torch.Tensor:
    x = normal(seed, 3 * size, size) @ (normal(seed + 1, size, size) / size**0.5 + torch.eye(size))
    return (x.mT @ x / len(x))[None]


def test_the_distance_of_a_binary_grid_is_the_best_one() -> None:
    weight, keep = normal(0, 6, 64), normal(1, 6, 64) > -0.5
    found = fit(weight, keep, 2)
    values, member = weight.unflatten(-1, (2, 32)) - found.mean[..., None], keep.unflatten(-1, (2, 32))

    def error(distance: torch.Tensor) -> torch.Tensor:
        return ((values.abs() - distance[..., None]).square() * member).sum(-1)

    count = member.sum(-1)
    exact = (values.square() * member).sum(-1) - (values.abs() * member).sum(-1).square() / count
    torch.testing.assert_close(error(found.distance), exact)
    for other in (0.9, 1.1):
        assert bool((error(other * found.distance) > error(found.distance)).all())
    assert not fit(weight, torch.zeros_like(keep), 2).distance.any()


def test_a_mask_of_nothing_is_binary_and_of_everything_is_eight_bits() -> None:
    weight = normal(2, 1, 8, 32)
    order = Order.of(weight, None)
    for share, expected in ((False, "signs"), (True, "bytes")):
        found = salient_and_signs(weight, torch.full_like(weight, share, dtype=torch.bool), order, None, torch.float32)
        if expected == "signs":
            decoded = torch.where(found.signs, 1.0, -1.0) * found.grid.distance + found.grid.mean
            torch.testing.assert_close(
                (weight - decoded).square().sum(-1), weight.var(-1, correction=0) * 32 - found.grid.distance[..., 0] ** 2 * 32
            )
        else:
            decoded = (found.codes.float() - found.affine.zero_point.float()) * found.affine.scale
            assert bool(((weight - decoded).abs() <= found.affine.scale / 2 + 1e-6).all())


def test_the_price_falls_with_the_share_of_salient_weights() -> None:
    weight, H = normal(3, 1, 48, 64), moment(4, 64)
    metric, losses = damp(shrink(H, 0.02), 0.01), []
    order = Order.of(weight, H)
    for share in (0, 0.1, 0.2, 0.5):
        salient = split(sensitivity(weight, order.importance), round(share * 48 * 64))
        found = salient_and_signs(weight, salient, order, None, torch.float32)
        signs = torch.where(found.signs, 1.0, -1.0) * found.grid.distance + found.grid.mean
        codes = (found.codes.float() - found.affine.zero_point.float()) * found.affine.scale
        losses.append(float(price(weight - torch.where(salient, codes, signs), metric)))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2 * losses[0]


def test_masks_coincide_where_the_inputs_are_alike() -> None:
    weight = normal(6, 1, 8, 32)
    order = Order.of(weight, torch.eye(32)[None] * 3)
    assert torch.equal(split(sensitivity(weight, order.importance), 40), split(weight.abs(), 40))


@settings(max_examples=30, database=None)
@given(st.integers(1, 9), st.sampled_from([None, 32]), st.sampled_from([1.35, 1.7, 2.4, 3.1]), st.integers(0, 99))
def test_salient_weights_come_back_and_are_counted(rows: int, group: int | None, bits: float, seed: int) -> None:
    level = Level(bits, group, True, "salient")
    weight = normal(seed, 1, rows, 64)
    packed = get("pb_llm")().encode(weight, level, torch.bfloat16, Statistics())[0]
    stored = packed.tensors()
    again = PackedSalient.from_tensors(stored, level)
    assert torch.equal(again.decode(), packed.decode())
    nominal = rows * 64 * level.bits / 8
    side = 2 * 2 * rows * (64 // (group or 64)) + 3 * rows + 16
    bitmap = rows * 64 / 8
    assert packed.nbytes == sum(t.nbytes for t in stored.values())
    assert packed.nbytes == pytest.approx(nominal + bitmap + side, abs=4 + 1)


def test_each_plane_takes_its_energy_exactly() -> None:
    weight = normal(7, 1, 16, 64)
    order = Order.of(weight, None)
    before = torch.zeros_like(weight)
    for _ in range(4):
        signs, distance = plane(weight, before, order, 2, torch.float32)
        after = before + torch.where(signs, 1.0, -1.0) * distance.repeat_interleave(32, -1)
        left, rest = ((weight - w).square().unflatten(-1, (2, 32)).sum(-1) for w in (before, after))
        torch.testing.assert_close(rest, left - 32 * distance.square(), rtol=1e-4, atol=1e-5)
        assert bool((rest < left).all())
        before = after


def test_the_front_of_the_file_is_the_low_version() -> None:
    for weight, curvature in pebble_block().values():
        high = encode("bit_planes", "planes5-g64", weight, curvature)
        assert isinstance(high, PackedPlanes)
        for bits in (3, 4):
            level = Level.parse(f"planes{bits}-g64")
            low = encode("bit_planes", level.name, weight, curvature)
            assert torch.equal(low.decode(), high.shortened(bits).decode())
            assert torch.equal(low.decode(), PackedPlanes.from_tensors(high.tensors(), level).decode())
            assert high.shortened(bits).nbytes == level.nbytes(*weight.shape) == low.nbytes
        assert torch.equal(high.shortened(2).decode(), encode("gptq", "int2-g64-asym", weight, curvature).decode())


def test_no_planes_at_all_are_stored_and_read() -> None:
    level = Level.parse("planes2-g32")
    packed = get("bit_planes")().encode(normal(8, 1, 8, 64), level, torch.bfloat16, Statistics())[0]
    stored = packed.tensors()
    assert torch.equal(PackedPlanes.from_tensors(stored, level).decode(), packed.decode())
    assert packed.nbytes == sum(t.nbytes for t in stored.values())


def test_on_real_weights_planes_gain_and_cost_what_nesting_costs() -> None:
    losses = [damage("gptq", "int2-g64-asym"), *(damage("bit_planes", f"planes{b}-g64") for b in (3, 4, 5, 6))]
    assert losses == sorted(losses, reverse=True)
    assert all(after < 0.6 * before for before, after in pairwise(losses))
    assert losses[2] > damage("gptq", "int4-g64-asym")  # a free grid of four bits is better than a nested one


def test_on_real_weights_the_salient_share_pays() -> None:
    losses = [damage("pb_llm", f"salient{b}-g128") for b in ("1.35", "1.7", "2.4", "3.1")]
    assert losses == sorted(losses, reverse=True)
