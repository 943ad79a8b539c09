"""Stored forms: exact bytes, errors against the obvious alternative, and codes that never change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.subjects import model, run, text
from torch import Tensor

import assay
from assay.methods.cache._packing import KeptChannels, SmoothedPairs, SortedChannels
from assay.runtime.attention import Rule, Step
from assay.runtime.codecs import BlockFloat, Float8, PerChannel, PerToken, Side, pack, unpack
from assay.runtime.tape import Tape, bytes_of


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(query: Tensor, keys: Tensor) -> Step:
    order = torch.arange(keys.shape[2])[None].expand(len(keys), -1)
    return Step(0, 0, query, keys, keys, order[:, None], order[:, -query.shape[2] :], order, order[:, 0], Rule(1.0), True)


def error(codec, x: Tensor) -> float:
    tokens, shared = codec.encode(x, {})
    return float((codec.decode(tokens, shared, x.shape[-1], x.dtype) - x).square().sum())


def relative(codec, x: Tensor) -> float:
    tokens, shared = codec.encode(x, {})
    lost = (codec.decode(tokens, shared, x.shape[-1], x.dtype) - x).square().sum(2)
    return float((lost / x.square().sum(2)).mean())


@settings(max_examples=60)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 33), st.integers(0, 1000))
def test_packing_is_exact_and_dense(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 2, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, count), codes)
    assert packed.shape[-1] == -(-count * bits // 8)


@pytest.mark.parametrize("codec", [PerToken(8, 16), PerChannel(8, 8), Float8(), BlockFloat(8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_are_close_and_equal_values_exact(codec, dtype: torch.dtype) -> None:
    x = tensor(2, 2, 16, 32).to(dtype)
    assert error(codec, x) < 2e-3 * float(x.float().square().sum())
    same = torch.full((1, 1, 8, 16), 3.0, dtype=dtype)
    assert error(codec, same) <= (0 if not isinstance(codec, Float8) else 1e-2)
    assert error(codec, torch.zeros_like(same)) == 0


@pytest.mark.parametrize("codec", [
    *(PerToken(b, 16) for b in (1, 2, 4, 8)), *(PerChannel(b, 8) for b in (1, 2, 4, 8)), Float8(),
    *(BlockFloat(b, 16) for b in (2, 4, 8)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_decode_what_torch_decodes(codec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, from views of larger tensors too, whatever the size of the numbers."""
    x = (tensor(2, 3, 40, 20) * torch.logspace(-6, 3, 20)).to(dtype)
    tokens, shared = codec.encode(x, {})
    part = {name: t[:, :, 8:24] for name, t in tokens.items()}
    ours = codec.decode(part, shared, 20, dtype)
    monkeypatch.setattr("assay.runtime.unpacking.runs_on", lambda *tensors: False)
    assert torch.equal(ours, codec.decode(part, shared, 20, dtype))


def test_an_outlier_channel_wants_scales_by_channel() -> None:
    x = tensor(1, 2, 64, 32)
    x[..., 5] += 30
    assert error(PerChannel(2, 32), x) < 0.1 * error(PerToken(2, 32), x)


def test_sorted_channels_help_small_blocks_and_not_one_block() -> None:
    x = tensor(1, 2, 64, 64) * tensor(64, seed=1).exp()
    ordered = SortedChannels()
    shared = ordered.fit(x, step(x, x))
    moved = ordered.forward(x, shared, torch.empty(0))
    assert torch.equal(ordered.backward(moved, shared, torch.empty(0)), x)
    # relative to each channel, because a query may weigh the small ones as much
    assert relative(BlockFloat(4, 16), moved) < 0.5 * relative(BlockFloat(4, 16), x)
    assert error(BlockFloat(4, 64), moved) == pytest.approx(error(BlockFloat(4, 64), x))


def test_smoothing_helps_where_pairs_differ() -> None:
    """Keys whose RoPE pairs differ in size and turn with position, as a query that weighs them alike would see them."""
    size = torch.linspace(-1.5, 1.5, 16).exp()
    angle = torch.arange(64)[:, None] * torch.linspace(0.05, 2, 16)
    x = torch.cat([size * angle.cos(), size * angle.sin()], -1)[None, None] * (1 + 0.1 * tensor(1, 1, 64, 32))
    smooth = SmoothedPairs(4)
    shared = smooth.fit(x, step(x, x))
    tokens, more = PerToken(4, 32).encode(smooth.forward(x, shared, torch.empty(0)), {})
    back = smooth.backward(PerToken(4, 32).decode(tokens, more, 32, x.dtype), shared, torch.empty(0))
    tokens, more = PerToken(4, 32).encode(x, {})
    plain = PerToken(4, 32).decode(tokens, more, 32, x.dtype)
    relative = torch.cat([size, size])
    assert ((back - x) / relative).square().sum() < 0.5 * ((plain - x) / relative).square().sum()


def test_channels_that_no_query_reads_go_first_however_large() -> None:
    keys, query = tensor(1, 2, 48, 16), tensor(1, 4, 32, 16, seed=3)
    query[..., [2, 9, 11, 12]] = 0
    keys[..., [2, 9, 11, 12]] *= 50
    kept = KeptChannels(0.75, 32)
    shared = kept.fit(keys, step(query, keys))
    thin = kept.backward(kept.forward(keys, shared, torch.empty(0)), shared, torch.empty(0))
    grouped = query.unflatten(1, (2, 2))
    torch.testing.assert_close(grouped @ thin[:, :, None].mT, grouped @ keys[:, :, None].mT)


def test_thin_keys_are_nearer_than_random_channels() -> None:
    keys, query = tensor(1, 1, 48, 16) * tensor(16, seed=5).exp(), tensor(1, 1, 32, 16, seed=3) * tensor(16, seed=6).exp()
    kept = KeptChannels(0.5, 32)
    exact = query @ keys.mT

    def lost(index: Tensor) -> float:
        return float((query[..., index] @ keys[..., index].mT - exact).norm())

    chosen = kept.fit(keys, step(query, keys))["channels"][0, 0].long()
    draws = [lost(torch.randperm(16, generator=torch.Generator().manual_seed(s))[:8]) for s in range(20)]
    assert lost(chosen) < min(draws)


def test_codes_never_change_once_written() -> None:
    tape = Tape(Side((), PerChannel(2, 8), 0, 8))
    first = tensor(1, 2, 20, 16)
    where = torch.empty(1, 0)
    tape.append(first)
    tape.store(step(first, first), where)
    before = tape.read(where)[:, :, :16].clone()
    for seed in range(12):
        tape.append(tensor(1, 2, 1, 16, seed=seed))
        tape.store(step(first, first), where)
    assert tape.old == 32
    assert torch.equal(tape.read(where)[:, :, :16], before)


def test_dropped_tokens_leave_the_codes_of_others() -> None:
    tape = Tape(Side((), PerChannel(4, 8), 0, 8))
    x, where = tensor(1, 2, 24, 16), torch.empty(1, 0)
    tape.append(x)
    tape.store(step(x, x), where)
    whole = tape.read(where)
    index = torch.tensor([[[0, 3, 9, 20], [1, 2, 17, 23]]])
    tape.keep(index)
    assert torch.equal(tape.read(where), whole.gather(2, index[..., None].expand(-1, -1, -1, 16)))


def test_bytes_count_storages_once() -> None:
    x = torch.zeros(100)
    assert bytes_of([x, x[:10], torch.zeros(3, dtype=torch.uint8)]) == 403


@pytest.mark.parametrize(("name", "options", "share"), [
    ("kivi", {"bits": 2, "group": 8, "residual": 8}, 0.26),
    ("fp8", {}, 0.36),
    ("block_float", {"bits": 4, "block": 16, "residual": 0}, 0.22),
    ("fireq", {"bits": 4, "group": 16, "residual": 0}, 0.29),
    ("think", {"thin": 0.5, "window": 4}, 0.80),
    ("cskv", {"density": 0.25, "window": 8}, 0.40),
])  # fmt: skip
def test_bytes_fall_as_promised(name: str, options: dict, share: float) -> None:
    """float32 keys and values of 16 channels, scales and positions included."""
    found, ids = model(), text(2, 96)
    with assay.attach(found, name, calibration=ids, **options) as attached, torch.no_grad():
        found(ids, use_cache=True)
        assert attached.nbytes < share * 3 * 2 * 2 * 2 * 96 * 16 * 4


def test_a_short_text_stays_exact_in_kivi_and_cskv() -> None:
    found, ids = model(), text(2, 30)
    dense, _ = run(found, ids, prompt=25)
    for name in ("kivi", "cskv"):
        with assay.attach(found, name, calibration=text(4)):
            ours, _ = run(found, ids, prompt=25)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


def test_the_best_basis_beats_the_weights_own_svd() -> None:
    """On the keys of held-out text, at equal rank: the closed form against the truncated SVD of the projection."""
    found, ids = model("llama"), text(8, 64)
    rank, losses = 8, {"ours": 0.0, "svd": 0.0}
    from assay.methods.cache._rope import Rope
    from assay.methods.cache._watch import watch
    from assay.methods.cache.cskv import CSKV

    policy = CSKV(density=0.25).calibrated(found, ids)

    def see(step: Step) -> None:
        still = Rope(found, step.layer).turn(step.keys, step.where, back=True).transpose(1, 2).flatten(2)
        left = torch.linalg.svd(found.model.layers[step.layer].self_attn.k_proj.weight.detach())[0][:, :rank]
        for name, basis in (("ours", policy.bases[step.layer][0].vectors), ("svd", left)):
            assert basis.shape == (32, rank)
            losses[name] += float((still @ basis @ basis.mT - still).square().sum())

    watch(found, text(8, 64, seed=7), see)
    assert losses["ours"] < losses["svd"]
