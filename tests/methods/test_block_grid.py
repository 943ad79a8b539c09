"""Scales and codes of ggml's blocks: what can be stored survives, nearest is nearest, searching pays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.budget.prices import price
from assay.measure.damage import Curvature
from assay.methods import base
from assay.methods.grid import blocks
from assay.methods.solve.blocks import solve
from assay.model import ggml
from assay.model.blocks import PackedBlocks
from assay.model.errors import InputError
from assay.model.ggml import KINDS, Parts
from assay.model.level import Level

GRIDS = [k for k in KINDS if k not in ("f16", "bf16")]
SCALAR = [k for k in GRIDS if not KINDS[k].codebook]
VECTOR = [k for k in GRIDS if KINDS[k].codebook]
COLUMNS = 256


def weights(seed: int, rows: int = 3, columns: int = COLUMNS) -> Tensor:
    """Numbers with heavy tails, [1, rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, rows, columns, generator=generator) * torch.randn(1, rows, columns, generator=generator).exp() * 0.02


def importance(seed: int, columns: int = COLUMNS) -> Tensor:
    return torch.rand(1, columns, generator=torch.Generator().manual_seed(seed + 1)) + 0.01


def random_parts(kind: str, seed: int) -> Parts:
    """Blocks of random codes with scales of a sensible size."""
    generator = np.random.default_rng(seed)
    facts = KINDS[kind]
    rows = torch.from_numpy(generator.integers(0, 256, (4, 1, 1024 // facts.weights * facts.nbytes), dtype=np.uint8))
    parts = ggml.unpack(kind, rows)
    size = 2.0 ** torch.from_numpy(generator.integers(-9, -3, parts.d.shape)).float()
    parts = parts._replace(d=size if kind == "mxfp4" else (size * 1.37).half().float())
    if kind in ("tq1_0", "tq2_0"):
        parts = parts._replace(codes=parts.codes.clamp(max=2))
    return parts if parts.m is None else parts._replace(m=(size * 0.61).half().float())


@pytest.mark.parametrize("kind", GRIDS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_what_the_blocks_can_hold_survives(kind: str, seed: int) -> None:
    parts = random_parts(kind, seed)
    values = ggml.values(kind, parts)
    found = blocks.coded(kind, parts, blocks.nearest(kind, parts, values))
    back = ggml.values(kind, ggml.unpack(kind, ggml.pack(kind, found)))
    torch.testing.assert_close(back, values, rtol=0, atol=1e-6 * float(values.abs().max()))


@pytest.mark.parametrize("kind", SCALAR)
def test_nearest_is_nearest_for_given_scales(kind: str) -> None:
    weight = weights(0)
    frame = blocks.fit_searched(kind, weight)
    low, high = (int(x) for x in blocks.ends(kind))
    steps = sorted(set(KINDS[kind].table)) or range(low, high + 1)
    all_levels = torch.stack([blocks.level(kind, frame, torch.full_like(weight, float(s))) for s in steps])
    best = (all_levels - weight).abs().amin(0)
    found = (blocks.level(kind, frame, blocks.nearest(kind, frame, weight)) - weight).abs()
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", VECTOR)
def test_nearest_vectors_are_nearest_for_given_scales(kind: str) -> None:
    weight, price = weights(1, rows=1), importance(1)
    frame = blocks.fit_searched(kind, weight, price)
    exact = (blocks.level(kind, frame, blocks.nearest(kind, frame, weight, price)) - weight).square() * price
    run, size = KINDS[kind].run, KINDS[kind].vector
    scale = blocks.affine(kind, frame).scale.repeat_interleave(KINDS[kind].group, -1)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=size)))
    for start in range(0, 64, run):
        # per vector the least error with an even and with an odd number of signs, over every vector and sign
        least = []
        for k in range(start, start + run, size):
            own = slice(k, k + size)
            levels = ggml.codebook(kind)[:, None] * signs * scale[0, 0, k]
            errors = ((levels - weight[0, 0, own]).square() * price[0, own]).sum(-1)
            odd = (signs < 0).sum(-1) % 2 == 1
            least.append((float(errors[:, ~odd].min()), float(errors[:, odd].min())))
        choices = itertools.product((0, 1), repeat=len(least))
        wanted = min(
            sum(pair[c] for pair, c in zip(least, choice, strict=True))
            for choice in choices
            if not KINDS[kind].even or sum(choice) % 2 == 0
        )
        assert float(exact[0, 0, start : start + run].sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("kind", VECTOR)
def test_the_short_search_of_a_codebook_loses_little(kind: str) -> None:
    weight, price = weights(2, rows=8), importance(2)
    frame = blocks.fit_searched(kind, weight, price)
    errors = [
        float(((blocks.level(kind, frame, blocks.nearest(kind, frame, weight, price, reach)) - weight).square() * price).sum())
        for reach in (None, blocks.REACH)
    ]
    assert errors[0] <= errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("kind", GRIDS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_searched_scales_are_never_worse_than_plain_ones(kind: str, seed: int) -> None:
    weight, price = weights(seed), importance(seed)

    def error(frame: Parts) -> Tensor:
        found = blocks.level(kind, frame, blocks.nearest(kind, frame, weight, price, blocks.REACH))
        return ((found - weight).square() * price[:, None]).unflatten(-1, (frame.d.shape[-1], -1)).sum(-1)

    plain, searched = error(blocks.fit(kind, weight)), error(blocks.fit_searched(kind, weight, price))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < plain.sum() or kind == "mxfp4"  # whose scales are powers of two: at times none is better


@pytest.mark.parametrize("kind", GRIDS)
def test_chosen_scales_can_be_stored(kind: str) -> None:
    weight = weights(5, rows=6)
    frame = blocks.fit_searched(kind, weight, importance(5))
    steps = blocks.nearest(kind, frame, weight)
    packed = PackedBlocks.of(kind, Parts(*(None if p is None else p[0] for p in blocks.coded(kind, frame, steps))))
    assert torch.equal(packed.decode(), blocks.level(kind, frame, steps)[0])


@pytest.mark.parametrize("kind", GRIDS)
def test_blocks_of_zeros_decode_to_zeros(kind: str) -> None:
    weight = torch.zeros(1, 4, COLUMNS)
    weight[0, 0, 3] = 1.0
    H, G = torch.eye(COLUMNS)[None], torch.eye(4)[None]
    for solver in ("nearest", "clip", "gptq", "two_sided", "admm"):
        decoded = ggml.values(kind, solve(weight, kind, solver, H, G))
        assert torch.isfinite(decoded).all()
        assert not decoded[0, 1:].any()
        assert float((decoded[0, 0, 3] - 1).abs()) < 0.55


def test_floats_are_rounded_once() -> None:
    weight = weights(7)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        for name in ("nearest", "ggml"):
            packed = base.get(name)().encode(weight, Level.parse(kind), torch.bfloat16, base.Statistics())[0]
            assert torch.equal(packed.decode(), weight[0].to(dtype).float())


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="q4_k cuts rows into blocks of 256 weights, which do not divide 320 inputs"):
        base.get("ggml")().encode(weights(0, columns=320), Level.parse("q4_k"), torch.bfloat16, base.Statistics())
    offered = base.get("ggml")().levels(320)
    assert {x.format for x in offered} == {"q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl"}
    assert base.get("ggml")().levels(100) == []


def test_prices_are_the_damage_of_rounding_to_nearest() -> None:
    weight, H = weights(9, rows=16)[0], importance(9)[0]
    curvature = Curvature(H, torch.rand(16, generator=torch.Generator().manual_seed(0)), 1.0, 100)
    levels = [Level.parse(k) for k in ("q6_k", "q4_k", "q3_k", "q2_k", "iq2_xs")]
    found = price(weight, curvature, levels)
    for level in levels:
        plain = base.get("nearest")().encode(weight[None], level, torch.float32, base.Statistics())[0].decode()
        assert found[level.name]["nearest"] == pytest.approx(curvature.damage(plain - weight), rel=1e-4)
    searched = [found[level.name]["two_sided"] for level in levels]
    assert searched == sorted(searched)
