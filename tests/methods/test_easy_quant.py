"""EasyQuant: outliers exact, scales at a minimum of the weight error, no data."""

import pytest
import torch
from measured import damage, encode, pebble_block

from assay.methods.base import Statistics, get
from assay.methods.grid.integer import IntegerGrid
from assay.methods.solve import nearest, scale_fit
from assay.methods.split.scores import deviation, split
from assay.model.level import Level
from assay.model.terms import PackedSum


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slope(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """dE/ds = 2 Σ (s k - w) k of each row, the codes held."""
    return 2 * ((scale * codes - weight) * codes).sum(-1)


def test_the_gradient_is_that_of_the_error() -> None:
    weight, codes, scale = normal(0, 5, 40).double(), normal(1, 5, 40).round().double(), torch.full((5, 1), 0.3).double()
    error = lambda s: ((s * codes - weight) ** 2).sum(-1)  # noqa: E731
    numeric = (error(scale + 1e-6) - error(scale - 1e-6)) / 2e-6
    torch.testing.assert_close(slope(weight, codes, scale), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_at_the_end_the_gradient_is_zero_and_the_error_has_fallen(bits: int) -> None:
    weight = normal(2, 32, 256)
    grid = IntegerGrid(bits, None, True, torch.float32)
    before, after = nearest.solve(weight, grid), scale_fit.solve(weight, grid)
    errors, slopes = [], []
    for rounded in (before, after):
        steps = rounded.codes.float() - grid.middle
        errors.append((rounded.affine.scale * steps - weight).square().sum(-1))
        slopes.append(
            slope(weight, steps, rounded.affine.scale).abs() / (2 * steps.square().sum(-1) * rounded.affine.scale[:, 0])
        )
    assert bool((errors[1] < errors[0]).all())
    assert float(slopes[0].median()) > 1e-3
    assert float(slopes[1].max()) < 1e-5


def test_no_group_gets_worse_whatever_the_scale_is_stored_in() -> None:
    weight = normal(3, 2, 16, 128)
    for dtype in (torch.bfloat16, torch.float16):
        for symmetric in (False, True):
            grid = IntegerGrid(4, 32, symmetric, dtype)
            rounded = [s.solve(weight, grid) for s in (nearest, scale_fit)]
            away = [grid.decode(r.codes, r.affine).float() - weight for r in rounded]
            errors = [a.square().unflatten(-1, (4, -1)).sum(-1) for a in away]
            assert bool((errors[1] <= errors[0]).all())


def test_outliers_are_the_weights_themselves() -> None:
    weight = normal(4, 1, 24, 128).bfloat16().float()
    level = Level.parse("int3-channel-sym+sparse0.01")
    packed = get("easy_quant")().encode(weight, level, torch.bfloat16, Statistics())[0]
    assert isinstance(packed, PackedSum) and packed.exact is not None
    mask = split(deviation(weight), 31)[0]
    assert torch.equal(packed.exact.mask(mask.shape), mask)
    assert torch.equal(packed.decode()[mask].float(), weight[0][mask])


def test_on_real_weights_the_split_wins_and_shrinking_without_it_loses() -> None:
    for bits in (4, 3):
        plain = damage("nearest", f"int{bits}-channel-sym")
        assert damage("easy_quant", f"int{bits}-channel-sym+sparse0.005") < 0.75 * plain
        # the paper's ablation: ranges shrunk over the outliers lower the weight error and raise the loss
        assert damage("easy_quant", f"int{bits}-channel-sym") > plain
        for weight, curvature in pebble_block().values():
            errors = [
                (encode(name, f"int{bits}-channel-sym", weight, curvature).decode().float() - weight).square().sum()
                for name in ("easy_quant", "nearest")
            ]
            assert errors[0] < errors[1]
