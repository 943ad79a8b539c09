"""Low-rank terms: optimal in their metric, worth it on trained weights, and in both orders."""

import pytest
import torch
from measured import damage, encode, pebble_block

from assay.methods.base import Statistics, get
from assay.methods.solve import low_rank
from assay.methods.solve.curvature import damage as price
from assay.methods.solve.curvature import damp
from assay.model.level import Level
from assay.model.terms import PackedSum


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int, size: int) -> torch.Tensor:
    x = normal(seed, 3 * size, size) @ normal(seed + 1, size, size)
    return x.mT @ x / len(x)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
def test_the_error_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    matrix = normal(0, 2, *shape)
    values = torch.linalg.svdvals(matrix.double())
    before = torch.full((2,), torch.inf)
    for rank in (0, 1, 3, 8, 19, min(shape)):
        A, B = low_rank.factors(matrix, rank)
        error = (matrix - A @ B).square().sum((1, 2))
        torch.testing.assert_close(error, values[:, rank:].square().sum(1).float(), rtol=1e-4, atol=1e-6)
        assert bool((error < before).all())
        before = error
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(2, shape[0], 8, generator=generator)
    fitted = random @ torch.linalg.lstsq(random, matrix).solution
    assert bool((values[:, 8:].square().sum(1) < (matrix - fitted).square().sum((1, 2))).all())


def test_each_metric_is_won_by_its_own_factors_and_no_small_change_helps() -> None:
    matrix, H, G = normal(2, 16, 24), moment(3, 24), moment(5, 16)
    metrics = {
        "plain": (torch.eye(24), torch.eye(16)),
        "inputs": (damp(H, 0.01), torch.eye(16)),
        "both": (damp(H, 0.01), damp(G, 0.01)),
    }
    found = {
        "plain": low_rank.factors(matrix, 5),
        "inputs": low_rank.factors(matrix, 5, H),
        "both": low_rank.factors(matrix, 5, H, G),
    }
    generator = torch.Generator().manual_seed(7)
    for name, (inner, outer) in metrics.items():
        losses = {n: float(price(matrix - A @ B, inner, outer)) for n, (A, B) in found.items()}
        assert min(losses, key=losses.__getitem__) == name and sorted(losses.values())[1] > 1.02 * losses[name]
        A, B = found[name]
        for _ in range(50):
            a, b = A + 0.01 * torch.randn(A.shape, generator=generator), B + 0.01 * torch.randn(B.shape, generator=generator)
            assert float(price(matrix - a @ b, inner, outer)) > losses[name]


def test_one_matrix_alone_and_in_a_batch() -> None:
    matrix, H = normal(8, 3, 12, 20), torch.stack([moment(s, 20) for s in (9, 11, 13)])
    A, B = low_rank.factors(matrix, 4, H)
    for i in range(3):
        a, b = low_rank.factors(matrix[i], 4, H[i])
        torch.testing.assert_close(a @ b, A[i] @ B[i], rtol=1e-3, atol=1e-3)


def test_lorc_keeps_the_codes_of_its_base_and_stores_what_it_counts() -> None:
    for weight, curvature in pebble_block().values():
        plain, summed = (encode(m, f"int3-g64-asym{r}", weight, curvature) for m, r in (("gptq", ""), ("lorc", "+rank8")))
        assert isinstance(summed, PackedSum) and summed.factors is not None
        assert torch.equal(summed.base.decode(), plain.decode())
        assert summed.nbytes - plain.nbytes == 2 * 8 * sum(weight.shape)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_orders_that_the_cards_name_on_real_weights(bits: int) -> None:
    level, codes = f"int{bits}-g64-asym+rank8", f"int{bits}-g64-asym"
    for base in ("nearest", "gptq", "two_sided"):
        assert damage("lorc", level, base=base) < damage(base, codes)
    weighted, plain = damage("lorc", level), damage("lorc", level, weighted=False)
    assert weighted < plain < damage("gptq", codes)
    assert damage("svd_quant", level) < damage("svd_quant", level, turns=1) < weighted


def test_weighting_wins_at_the_outputs_and_loses_at_the_weights() -> None:
    for weight, curvature in pebble_block().values():
        errors = []
        for weighted in (True, False):
            packed = encode("lorc", "int3-g64-asym+rank8", weight, curvature, weighted=weighted)
            away = packed.decode().float() - weight
            errors.append((float(price(away, curvature.h)), float(away.square().sum())))
        assert errors[0][0] < errors[1][0] and errors[0][1] > errors[1][1]


def test_more_rank_is_better_in_the_order_of_svdquant() -> None:
    weight = normal(20, 64, 96) * (1.2 * normal(21, 96)).exp()  # columns of lognormal scale
    errors = []
    for rank in (0, 8, 16, 32):
        method = get("svd_quant")(base="nearest", weighted=False)
        level = Level.parse("int4-g32-sym" + (f"+rank{rank}" if rank else ""))
        packed = method.encode(weight[None], level, torch.float32, Statistics())[0]
        errors.append(float((packed.decode() - weight).norm() / weight.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
