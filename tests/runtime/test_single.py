"""Kernels for single queries against the same in torch: every stored form, mask and cap, whatever the threads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from runtime.subjects import ALL, model, padded, run, text
from torch import Tensor

import assay
from assay.methods.cache import _turning
from assay.methods.cache._evict import hashed
from assay.methods.cache._noise import gumbel, noisy_sums
from assay.methods.cache._packing import KeptChannels, SmoothedPairs, SortedChannels
from assay.methods.cache._turning import turned_dots
from assay.methods.cache.scissorhands import Scissorhands
from assay.runtime import packing, picked, single, slots
from assay.runtime.attention import Rule, Step, softmaxed, visible
from assay.runtime.codecs import BlockFloat, Float8, PerChannel, PerToken, Side
from assay.runtime.lane import Arrival, Lane
from assay.runtime.policy import Stack
from assay.runtime.select import protect
from assay.runtime.slots import lowest

FORMS: dict[str, tuple[Side | None, Side | None]] = {
    "as they are": (None, None),
    "kivi": (Side((), PerChannel(2, 8), 0, 8), Side((), PerToken(4, 8), 5)),
    "eight bits": (Side((), PerChannel(8, 8), 0, 8), Side((), PerToken(8, 20), 0)),
    "one bit": (Side((), PerToken(1, 5), 3), Side((), PerChannel(1, 8), 0, 8)),
    "fp8": (Side((), Float8(), 0), Side((), Float8(), 2)),
    "blocks": (Side((SortedChannels(),), BlockFloat(4, 10), 4), Side((), BlockFloat(2, 10), 4)),
    "smoothed": (Side((SmoothedPairs(4),), PerToken(4, 10), 4), Side((), PerToken(4, 10), 4)),
    "thin": (Side((KeptChannels(0.6, 8),), None, 4), None),
    "values sorted": (None, Side((SortedChannels(),), PerToken(4, 10), 4)),
}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lane(sides: tuple[Side | None, Side | None], rule: Rule, dtype: torch.dtype, pads: int, steps: int = 3) -> list[Tensor]:
    """Outputs of single queries behind 40 tokens, three query heads to each of two key heads, 20 channels."""

    class Packer:
        stage = 2

        def sides(self, layer: int) -> tuple[Side | None, Side | None]:
            return sides

    made, outs = Lane(Stack(packers=(Packer(),)), 0, 0), []
    for i, length in enumerate([40, *[1] * steps]):
        end = 40 + i
        positions = torch.arange(end - length, end).expand(2, -1).clone()
        positions[1, : max(pads - end + length, 0)] = -1
        new = Arrival(positions, positions.clamp_min(0), torch.tensor([0, pads]), bool((positions < 0).any()), end - 1, i == 0, i)
        query, keys, values = (tensor(2, h, length, 20, seed=7 * i + h).to(dtype) for h in (6, 2, 2))
        out, step = made.step(query, keys, values, new, rule)
        made.store(step)
        outs.append(out)
    return outs[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_attends_as_torch_does(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for rule, pads in ((Rule(0.3), 0), (Rule(0.3), 6), (Rule(0.3, window=17), 6), (Rule(0.5, softcap=2.0), 0)):
        ours = lane(FORMS[form], rule, dtype, pads)
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "_compiled", lambda *args: False)
            theirs = lane(FORMS[form], rule, dtype, pads)
        loose = 2e-5 if dtype == torch.float32 else 4e-2 if dtype == torch.bfloat16 else 6e-3
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, atol=loose, rtol=loose)


@pytest.mark.parametrize("name", ["h2o", "keyformer", "kivi", "cskv", "double_sparsity"])
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, (ids, mask), before = model(), padded(5, 60), torch.get_num_threads()
    for module in ("runtime.single", "runtime.picked", "methods.cache._noise", "methods.cache._turning"):
        monkeypatch.setattr(f"assay.{module}.WORTH_SHARING", 0)
    options: dict[str, Any] = {"calibration": text(4)} | ({"budget": 0.4} if name in ("h2o", "keyformer") else {})
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with assay.attach(found, name, **options) as attached:
                torch.set_num_threads(1)
                cache = run(found, ids[:, :50], mask[:, :50], prompt=50)[1]
                torch.set_num_threads(threads)
                kept = [p.clone() for layer in attached.layers for p in layer.kept()]
                lanes = [layer.lanes[0] for layer in attached.layers]
                query, key = tensor(2, 4, 1, 16, seed=3), tensor(2, 2, 1, 16, seed=4)
                new = Arrival(torch.full((2, 1), 50), torch.full((2, 1), 50), attached.layers[0].first, False, 50, False, 1)
                outs = [x.step(query, key, key, new, Rule(0.25))[0] for x in lanes]
                assert cache is attached.cache
            results.append((outs, kept))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_token_in_grad_mode_still_reaches_the_weights() -> None:
    """The kernels know no gradients, so they stand back."""
    found, ids = model(), text(1, 20)
    with assay.attach(found, "streaming_llm", budget=1.0):
        with torch.no_grad():
            cache = found(ids[:, :19], use_cache=True).past_key_values
        found(ids[:, 19:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert found.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_one_query_among_picked_slots_is_attention_to_those(monkeypatch: pytest.MonkeyPatch) -> None:
    found, (ids, mask) = model("gemma2"), padded(7, 60)
    options = {"read": 0.3, "least": 4, "dense": 1, "calibration": text(4)}
    results = []
    for compiled in (True, False):
        with monkeypatch.context() as patch, assay.attach(found, "double_sparsity", **options):
            if not compiled:
                patch.setattr(Lane, "_compiled", lambda *args: False)
            results.append(run(found, ids, mask, prompt=50)[0][mask.bool()])
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=2e-5)


def noisy(length: int, slots: int) -> Step:
    positions = torch.randint(0, 9000, (2, 2, slots), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    queries, first = 9000 + torch.arange(length).expand(2, -1), torch.tensor([0, 17])
    found = tensor(2, 2, 3, length, slots)
    return Step(3, 2, torch.empty(2, 6, length, 8), torch.empty(2, 2, length, 8), torch.empty(2, 2, length, 8), positions,
                queries, queries, first, Rule(1.0), length > 1, found=found, whole=length == 1)  # fmt: skip


def test_compiled_noise_is_the_hash_that_torch_makes() -> None:
    step = noisy(5, 100)
    head = (3 * 4096 + 2 + torch.arange(2))[None, :, None, None, None] * 64 + torch.arange(3)[None, None, :, None, None]
    asked = (step.queries - step.first[:, None])[:, None, None, :, None]
    slots = (step.positions - step.first[:, None, None]).clamp_min(0)[:, :, None, None, :]
    wanted = -0.7 * (-hashed(head, asked, slots, seed=11).log()).log()
    torch.testing.assert_close(gumbel(step, slice(0, 5), 0.7, 11), wanted, atol=3e-6, rtol=3e-6)
    assert not torch.allclose(gumbel(step, slice(0, 5), 0.7, 12), wanted)


def test_noisy_attention_of_one_query_is_what_its_noise_gives() -> None:
    step = noisy(1, 100)
    assert step.found is not None
    wanted = softmaxed((step.found + gumbel(step, slice(0, 1), 0.7, 11)) / 1.5, None).mean(2)[:, :, 0]
    torch.testing.assert_close(noisy_sums(step, 0.7, 11, 1.5), wanted, atol=1e-6, rtol=1e-5)


def test_keys_turned_on_the_way_are_turned_keys() -> None:
    """Places in any order, and channels that don't turn."""
    query, still, where = tensor(2, 2, 3, 20), tensor(2, 70, 40, seed=1), torch.randint(0, 300, (2, 70), dtype=torch.int32)
    angle = torch.arange(300)[:, None] * torch.linspace(0.01, 1.5, 8)
    cos, sin = angle.cos(), angle.sin()
    keys = still.unflatten(2, (2, 20)).transpose(1, 2)
    first, second, rest = keys.split([8, 8, 4], -1)
    c, s = (x[where.long()][:, None] for x in (cos, sin))
    turned = torch.cat([first * c - second * s, second * c + first * s, rest], -1)
    torch.testing.assert_close(turned_dots(query, still, where, cos, sin), query @ turned.mT, atol=2e-5, rtol=2e-5)


def test_the_slot_that_goes_is_the_lowest_unprotected_one() -> None:
    score, positions = tensor(2, 3, 50).mul(4).round(), torch.stack([torch.randperm(50) for _ in range(6)]).view(2, 3, 50).int()
    first = torch.tensor([0, 3])
    wanted = protect(score, positions, first, 4, 40, False)
    found = lowest(score, positions.numpy(), first, 4, 40)
    assert torch.equal(wanted.gather(2, found)[..., 0], wanted.amin(-1))


def test_the_last_token_takes_the_place_of_the_lowest() -> None:
    """In keys, values and positions alike, whether each head keeps its own or all the same."""
    for heads in (1, 3):
        score, positions = tensor(2, heads, 50), torch.arange(50, dtype=torch.int32).repeat(2, heads, 1)
        keys, values, first = tensor(2, 3, 60, 4, seed=1), tensor(2, 3, 60, 4, seed=2), torch.zeros(2, dtype=torch.long)
        gone, before = lowest(score, positions.numpy(), first, 2, 44), (keys.clone(), values.clone())
        found = slots.replace_lowest(score, positions.numpy(), first, 2, 44, keys.numpy(), values.numpy())
        assert torch.equal(found, gone)
        assert (positions.gather(2, gone) == 49).all()
        index = gone.expand(2, 3, 1)[..., None].expand(-1, -1, -1, 4)
        for now, then in zip((keys, values), before, strict=True):
            assert torch.equal(now, then.scatter(2, index, then[:, :, 49:50]))


def test_one_query_counts_as_many_do() -> None:
    attention = tensor(2, 2, 4, 1, 30).mul(3).softmax(-1).masked_fill(tensor(2, 2, 1, 1, 30) > 1, 0)
    step = dataclasses.replace(noisy(1, 30), attention=attention)
    past = [torch.full((2, 2, 30), float(i)) for i in (2, 5)]
    seen = attention > 0
    wanted = [past[0] + ((attention * seen.sum(-1, keepdim=True) < 1) & seen).float().mean(2)[:, :, 0],
              past[1] + seen.float().mean(2)[:, :, 0]]  # fmt: skip
    found = Scissorhands().observe(step, (past[0], past[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("codec", [*(PerToken(b, 16) for b in (1, 2, 4, 8)), *(PerChannel(b, 8) for b in (1, 2, 4, 8)), Float8()])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-9, 3e4])
def test_the_kernels_write_what_torch_writes(codec: Any, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, ties and numbers too large or too small for 16 bits included."""
    spread = torch.logspace(-6, 3, 20)
    for x in (tensor(2, 3, 32, 20) * spread, tensor(2, 3, 32, 20).mul(8).round() / 4, torch.zeros(1, 1, 16, 20)):
        ours = codec.encode(x * size, {})
        with monkeypatch.context() as patch:
            patch.setattr(packing, "runs_on", lambda x: False)
            theirs = codec.encode(x * size, {})
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(a[n].dtype == b[n].dtype and torch.equal(a[n].float(), b[n].float()) for n in a)


def test_kernels_meet_dense_arrays_only() -> None:
    """For another layout numba would compile for ten seconds in the middle of a text."""
    found, (ids, mask) = model("gemma2"), padded(7, 60)
    for name in ALL:
        options = {"read": 0.25, "least": 4, "dense": 1} if name == "double_sparsity" else {}
        with assay.attach(found, name, calibration=text(4), **options):
            run(found, ids, prompt=40)
            run(found, ids, mask, prompt=40)
    for kernel in (single._attend, picked._attend, picked._guesses, slots._replace_lowest, slots.move, _turning._turned_dots):
        assert kernel.signatures
        assert not any("A)" in str(s) or "'A'" in str(s) for s in kernel.signatures)


def test_visibility_is_that_of_the_masks() -> None:
    """A query sees slots up to its own position and within the window; of a hidden row it gets nothing."""
    rule, outs = Rule(0.3, window=9), lane((None, None), Rule(0.3, window=9), torch.float32, 45)
    assert (outs[0][1] == 0).all() and (outs[0][0] != 0).any()
    assert not visible(torch.tensor([[[3, -1, 12]]]), torch.tensor([[12]]), rule.window)[0, 0, 0, :2].any()
