"""What every cache policy must do: nothing at full budget, what its kept positions say, and nothing it shouldn't know."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from runtime.masked import masked
from runtime.subjects import ALL, CODED, EVICTORS, EXACT, FAMILIES, model, padded, run, text
from torch import Tensor
from transformers import DynamicCache

import assay
from assay.attaching import named
from assay.runtime.attention import Rule
from assay.runtime.layer import Layer, Pending
from assay.runtime.policy import Stack

BUDGETED = {name: {"budget": 0.4} for name in EVICTORS}


def kept_mask(positions: Tensor, heads: int, seen: int) -> Tensor:
    found = torch.zeros(len(positions), heads, seen + 1, dtype=torch.bool)
    index = positions.expand(-1, heads, -1).long()
    return found.scatter_(2, torch.where(index < 0, seen, index), True)[..., :seen]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n in ALL if n not in CODED])
def test_a_full_budget_changes_nothing(name: str, family: str) -> None:
    found, (ids, mask) = model(family), padded(7)
    dense, _ = run(found, ids, mask)
    options = EXACT.get(name, {"budget": 1.0})
    with assay.attach(found, name, calibration=text(4), **options):
        ours, _ = run(found, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], dense[real], atol=2e-5, rtol=2e-5)
    again, _ = run(found, ids, mask)
    assert torch.equal(again, dense), "the model is not as it was before"


@pytest.mark.parametrize(("family", "name"), [
    *itertools.product(("llama", "gemma2"), EVICTORS),
    *itertools.product([f for f in FAMILIES if f not in ("llama", "gemma2")], ("h2o", "snapkv")),
])  # fmt: skip
def test_dropping_is_masking(family: str, name: str) -> None:
    """A full cache whose dropped columns are masked gives the same logits, step by step."""
    found, (ids, mask) = model(family), padded(5)
    allowed: dict[tuple[int, int], Tensor] = {}
    with assay.attach(found, name, budget=0.4) as attached:

        def see(seen: int) -> None:
            for i, layer in enumerate(attached.layers):
                (positions,) = layer.kept()
                allowed[i, seen] = kept_mask(positions, 2, seen)

        ours, _ = run(found, ids, mask, see=see)
    assert 0.2 < allowed[1, 40].float().mean() < 0.75
    with masked(found, allowed):
        theirs, _ = run(found, ids, mask, cache=DynamicCache())
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", EVICTORS)
def test_planted_heavy_hitters_stay(name: str) -> None:
    """Five slots in the middle hold 90% of every query's attention: a score by attention keeps all, a window none."""
    generator = torch.Generator().manual_seed(1)
    planted, length, width = [40, 47, 55, 62, 70], 120, 32
    keys = 0.05 * torch.randn(1, 2, length, width, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    keys[:, :, planted] += 8 * direction
    query = 0.05 * torch.randn(1, 4, length, width, generator=generator) + 4.4 * direction
    siblings: list[Layer] = []
    policy = named(name)(budget=0.25, **({"kernel": 1} if name == "snapkv" else {}))
    siblings.append(Layer(Stack(policy), 0, siblings, None))
    siblings[0].update(keys, keys)
    siblings[0].attend(query, Pending(siblings[0], keys, keys), None, None, Rule(width**-0.5))
    (positions,) = siblings[0].kept()
    share = torch.stack([(positions == p).any(-1).float().mean() for p in planted]).mean()
    if name == "streaming_llm":
        assert share == 0
    elif name == "random":
        assert share < 0.8
    else:
        assert share == 1


@pytest.mark.parametrize("name", EVICTORS)
def test_later_tokens_do_not_change_what_was_kept(name: str) -> None:
    found, ids = model(), text(1)
    other = ids.clone()
    other[:, 33:] = text(1, 40, seed=9)[:, 33:]
    logs: list[dict[int, list[Tensor]]] = []
    for given in (ids, other):
        log: dict[int, list[Tensor]] = {}
        with assay.attach(found, name, budget=0.4) as attached:
            run(
                found, given, see=lambda seen, log=log: log.update({seen: [p.clone() for x in attached.layers for p in x.kept()]})
            )
        logs.append(log)
    for seen in range(30, 34):
        assert all(torch.equal(a, b) for a, b in zip(logs[0][seen], logs[1][seen], strict=True))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("kivi", "cskv")])
def test_a_row_does_not_depend_on_its_neighbour(name: str) -> None:
    """Alone, or padded on the left beside a longer row: the same tokens kept, the same logits.

    Policies that write blocks of tokens align them to the longest row, so these two are left out.
    """
    found, (ids, mask) = model(), padded(9)
    options: dict[str, Any] = BUDGETED.get(name, {})
    with assay.attach(found, name, calibration=text(4), **options) as attached:
        both, _ = run(found, ids, mask)
        beside = [kept_mask(p, 2, 40)[1:, :, 9:] for x in attached.layers for p in x.kept()]
        alone, _ = run(found, ids[1:, 9:], prompt=21)
        by_itself = [kept_mask(p, 2, 31) for x in attached.layers for p in x.kept()]
    assert all(torch.equal(a, b) for a, b in zip(beside, by_itself, strict=True))
    torch.testing.assert_close(both[1:, 9:], alone, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", EVICTORS)
def test_memory_is_released(name: str) -> None:
    found, ids = model(), text(2, 101)
    dense = 3 * 2 * 2 * 2 * 16 * 100 * 4
    with assay.attach(found, name, budget=0.25) as attached, torch.no_grad():
        found(ids[:, :100], use_cache=True)
        counted = named(name)().statistics
        per_slot = 2 * 16 * 4 + 4 + 4 * counted
        assert attached.nbytes <= 3 * 2 * 2 * 25 * per_slot + 500
        assert attached.nbytes < 0.3 * dense


@pytest.mark.parametrize("name", [n for n in ALL if n != "random"])
def test_reordered_rows_take_their_state_along(name: str) -> None:
    found, ids = model(), text(2)
    swapped = torch.tensor([1, 0])
    options: dict[str, Any] = BUDGETED.get(name, {})
    with assay.attach(found, name, calibration=text(4), **options), torch.no_grad():
        straight, _ = run(found, ids, cache=None)
        out = found(ids[:, :30], use_cache=True)
        cache = out.past_key_values
        cache.reorder_cache(swapped)
        rest = []
        for i in range(30, 40):
            rest.append(found(ids[swapped][:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(rest, 1)[swapped], straight[:, 30:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "kivi", "double_sparsity"])
def test_beams_are_those_of_the_dense_model(name: str) -> None:
    found, ids = model(), text(2, 20)
    options = {"kivi": {"residual": 64}}.get(name, EXACT.get(name, {"budget": 1.0}))
    wanted = found.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
    with assay.attach(found, name, calibration=text(4), **options):
        assert torch.equal(found.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0), wanted)


@pytest.mark.parametrize("name", EVICTORS)
def test_a_prompt_may_come_in_chunks(name: str) -> None:
    found, ids = model(), text(2, 90)
    most = []
    with assay.attach(found, name, tokens=12) as attached:
        run(
            found,
            ids,
            prompt=80,
            chunk=16,
            see=lambda _: most.append(max(len(lane) for x in attached.layers for lane in x.lanes)),
        )
    assert max(most) <= 12 * (3 if name == "prefixkv" else 1) + (10 if name in ("snapkv", "random") else 0)
    dense, _ = run(found, ids, prompt=80)
    with assay.attach(found, name, budget=1.0):
        ours, _ = run(found, ids, prompt=80, chunk=16)
    torch.testing.assert_close(ours, dense, atol=2e-5, rtol=2e-5)


CLOSE: dict[str, dict[str, Any]] = {
    "kivi": {"bits": 8, "group": 4, "residual": 4}, "fp8": {}, "block_float": {"bits": 8, "residual": 4},
    "fireq": {"bits": 8, "residual": 4}, "think": {"thin": 0.0}, "cskv": {"density": 1.0, "window": 8},
    "double_sparsity": {"read": 1.0},
}  # fmt: skip
"""Options with which a policy that stores or reads otherwise changes next to nothing."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLOSE)
def test_stored_tokens_serve_chunks_and_every_family(name: str, family: str) -> None:
    """A prompt in chunks, left padding and single tokens, read from codes of eight bits: close to the dense model."""
    found, (ids, mask) = model(family), padded(6, 60)
    dense, _ = run(found, ids, mask, prompt=50)
    with assay.attach(found, name, calibration=text(4), **CLOSE[name]) as attached:
        ours, _ = run(found, ids, mask, prompt=50, chunk=17)
        stored = max(lane.keys.old for layer in attached.layers for lane in layer.lanes)
    assert stored >= 30 or name in ("think", "double_sparsity")
    real = mask.bool()
    lost = (ours - dense)[real].abs().max(-1)[0]
    # these heads attend sharply, which makes much of a little; a token in the wrong place would cost a deviation
    share = 1e-4 if name in ("think", "cskv", "double_sparsity") else 0.3 if name == "fp8" else 0.1
    assert lost.median() < share * dense[real].std()


@pytest.mark.parametrize("name", ["fp8", "block_float", "fireq"])
def test_a_row_is_stored_as_it_is_alone(name: str) -> None:
    """Beside a longer row: the same tokens are codes and the same are exact at every step."""
    found, (ids, mask) = model(), padded(9, 60)
    with assay.attach(found, name, **{k: v for k, v in CLOSE[name].items() if k != "bits"}):
        both, _ = run(found, ids, mask, prompt=50)
        alone, _ = run(found, ids[1:, 9:], prompt=41)
    torch.testing.assert_close(both[1:, 9:], alone, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n not in EVICTORS])
def test_later_tokens_do_not_change_what_was_said(name: str) -> None:
    """Nothing of a later token reaches the logits of an earlier one, codes and choices of what is read included."""
    found, ids = model(), text(1, 60)
    other = ids.clone()
    other[:, 52:] = text(1, 60, seed=9)[:, 52:]
    with assay.attach(found, name, calibration=text(4)):
        logits = [run(found, given, prompt=40)[0] for given in (ids, other)]
    assert torch.equal(logits[0][:, :52], logits[1][:, :52])
    assert not torch.equal(logits[0][:, 52:], logits[1][:, 52:])


def test_a_cache_of_codes_reads_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single queries decode stored tokens some at a time; how many makes no difference."""
    found, ids = model(), text(2, 110)
    results = []
    for size in (1 << 18, 1):
        monkeypatch.setattr("assay.runtime.tape.DECODED_AT_ONCE", size)
        with assay.attach(found, "kivi", bits=4, group=8, residual=8):
            results.append(run(found, ids, prompt=100)[0])
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("beyond", ["h2o", "streaming_llm"])
def test_reading_less_and_dropping_go_together(beyond: str) -> None:
    """What is not read gets no attention; at a full budget nothing but the reading changes."""
    found, ids = model(), text(2)
    options = {"calibration": text(4), "read": 0.5, "least": 4, "dense": 0}
    with assay.attach(found, "double_sparsity", **options):
        alone, _ = run(found, ids)
    with assay.attach(found, beyond, "double_sparsity", budget=1.0, **options):
        both, _ = run(found, ids)
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
    with assay.attach(found, beyond, "double_sparsity", budget=0.4, **options) as attached:
        run(found, ids)
        assert max(len(lane) for layer in attached.layers for lane in layer.lanes) <= 16


def test_keyformer_without_noise_is_h2o() -> None:
    found, ids = model(), text(2)
    kept = []
    for name, options in (("h2o", {}), ("keyformer", {"noise": 0.0, "end": 1.0, "recent_share": 0.5})):
        with assay.attach(found, name, budget=0.4, **options) as attached:
            run(found, ids)
            kept.append([p for x in attached.layers for p in x.kept()])
    assert all(torch.equal(a.sort(-1)[0], b.sort(-1)[0]) for a, b in zip(*kept, strict=True))


def test_scissorhands_saws_between_its_two_lengths() -> None:
    found, ids = model(), text(1, 120)
    lengths = []
    with assay.attach(found, "scissorhands", tokens=30, drop=0.4) as attached:
        run(found, ids, prompt=30, see=lambda _: lengths.append(len(attached.layers[0].lanes[0])))
    assert max(lengths) == 30
    assert min(lengths) == 18
    assert sum(a > b for a, b in itertools.pairwise(lengths)) <= 120 // 12


def test_snapkv_keeps_what_only_the_window_sees_and_h2o_loses_it() -> None:
    generator = torch.Generator().manual_seed(2)
    length, width, needle = 128, 32, 60
    early, late = torch.eye(width)[:2]
    keys = 0.02 * torch.randn(1, 1, length, width, generator=generator)
    keys[:, :, :40] += 6 * early
    keys[:, :, needle] += 6 * late
    query = torch.zeros(1, 1, length, width) + 4 * early
    query[:, :, -8:] = 4 * late
    held = {}
    for name, options in (("snapkv", {"window": 8, "kernel": 1}), ("h2o", {})):
        siblings: list[Layer] = []
        siblings.append(Layer(Stack(named(name)(budget=0.2, **options)), 0, siblings, None))
        siblings[0].update(keys, keys)
        siblings[0].attend(query, Pending(siblings[0], keys, keys), None, None, Rule(width**-0.5))
        held[name] = bool((siblings[0].kept()[0] == needle).any())
    assert held == {"snapkv": True, "h2o": False}
