"""GWQ: the weights with the largest gradients are exact, and worth it."""

import torch
from measured import damage, encode, pebble_block

from assay.methods.base import Statistics, get
from assay.methods.split.scores import split
from assay.model.level import Level
from assay.model.terms import PackedSum

LEVEL = "int3-g64-asym+sparse0.01"


def test_the_weights_with_the_largest_gradients_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 24, 128, generator=generator).bfloat16().float()
    gradient = torch.randn(weight.shape, generator=generator)
    for packed, w, g in zip(
        get("gwq")().encode(weight, Level.parse(LEVEL), torch.bfloat16, Statistics(gradient=gradient)),
        weight,
        gradient,
        strict=True,
    ):
        assert isinstance(packed, PackedSum) and packed.exact is not None
        kept = packed.exact.mask(w.shape)
        assert g.abs()[kept].min() > g.abs()[~kept].max()
        assert torch.equal(packed.decode()[kept].float(), w[kept])
        assert not torch.equal(packed.decode()[~kept].float(), w[~kept])


def test_the_grid_is_fitted_to_the_rest() -> None:
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    weight[0, :, 5] = 50.0
    gradient = (weight > 10).float()
    level = Level.parse("int4-g64-asym+sparse0.015625")
    packed = get("gwq")().encode(weight, level, torch.float32, Statistics(gradient=gradient))[0]
    assert float((packed.decode() - weight[0]).abs().max()) < 0.5


def test_real_gradients_choose_better_than_their_reverse_and_not_by_size() -> None:
    total = dict.fromkeys(("best", "worst", "count", "both"), 0.0)
    for weight, curvature in pebble_block().values():
        assert curvature.gradient is not None
        count = Level.parse(LEVEL).kept(*weight.shape)
        large, steep = split(weight.abs(), count), split(curvature.gradient.abs(), count)
        total["count"] += count
        total["both"] += int((large & steep).sum())
        total["best"] += curvature.damage(encode("gwq", LEVEL, weight, curvature).decode().float() - weight)
        reverse = Statistics(gradient=1 / (curvature.gradient.abs()[None] + 1e-12))
        packed = get("gwq")().encode(weight[None], Level.parse(LEVEL), torch.bfloat16, reverse)[0]
        total["worst"] += curvature.damage(packed.decode().float() - weight)
    assert 0 < total["both"] < 0.5 * total["count"]
    assert total["best"] < total["worst"]
    assert total["best"] < damage("nearest", "int3-g64-asym")
