"""ZeroQuant-FP's M1: power-of-two scales by ceil cast exactly to FP8, at the loss that its card states."""

import pytest
import torch

from assay.methods.base import Statistics, get
from assay.model.level import Level
from assay.model.packed import PackedTable


def encode(name: str, weight: torch.Tensor, level: str) -> PackedTable:
    packed = get(name)().encode(weight[None], Level.parse(level), torch.bfloat16, Statistics())[0]
    assert isinstance(packed, PackedTable) and packed.scale is not None
    return packed


@pytest.mark.parametrize("level", ["fp4-g32", "fp4-g128", "fp4-channel"])
def test_scales_are_the_smallest_powers_of_two_that_cover_and_weights_are_fp8_numbers(level: str) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    packed = encode("zero_quant_fp", weight, level)
    assert packed.scale is not None
    free = weight.unflatten(-1, (packed.scale.shape[-1], -1)).abs().amax(-1) / 6
    assert torch.equal(packed.scale.float()[1:], torch.exp2(free[1:].log2().ceil()))
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
        assert torch.equal(packed.decode().to(dtype).float(), packed.decode().float())


def test_on_t_distributed_groups_such_scales_lose_what_the_card_says() -> None:
    torch.manual_seed(1)
    weight = torch.distributions.StudentT(5.0).sample((256, 256))
    for name, stated in (("nearest", 0.0182), ("zero_quant_fp", 0.0328)):
        error = (encode(name, weight, "fp4-channel").decode().float() - weight).square().sum() / weight.square().sum()
        assert float(error) == pytest.approx(stated, rel=0.1)
