"""Policies on top of each other, and budgets that differ by layer and head."""

from __future__ import annotations

import pytest
import torch
from runtime.subjects import model, padded, run, text

import assay
from assay.methods.cache.kivi import Kivi
from assay.methods.cache.snapkv import SnapKV
from assay.methods.cache.think import ThinK


def test_the_order_given_does_not_matter() -> None:
    found, (ids, mask) = model(), padded(5, 60)
    made = (SnapKV(budget=0.6), ThinK(thin=0.25, window=8), Kivi(bits=4, group=8, residual=8))
    results = []
    for policies in (made, made[::-1]):
        with assay.attach(found, *policies) as attached:
            results.append((run(found, ids, mask, prompt=50)[0], attached.nbytes))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_each_policy_on_top_takes_bytes_away() -> None:
    found, ids = model(), text(2, 90)
    sizes = []
    for names in ([], ["think"], ["think", "kivi"]):
        with assay.attach(found, "snapkv", *names, **{k: v for k, v in OPTIONS.items() if k in fields(names)}) as attached:
            run(found, ids, prompt=89)
            sizes.append(attached.nbytes)
    assert sizes[0] > sizes[1] > sizes[2]


OPTIONS = {"budget": 0.8, "window": 8, "thin": 0.5, "bits": 2, "group": 8, "residual": 8}


def fields(names: list[str]) -> set[str]:
    return (
        {"budget", "window"}
        | ({"thin"} if "think" in names else set())
        | ({"bits", "group", "residual"} if "kivi" in names else set())
    )


@pytest.mark.parametrize("name", ["h2o", "streaming_llm", "keyformer", "scissorhands", "snapkv", "prefixkv"])
def test_eight_bits_under_an_evictor_keep_the_same_tokens(name: str) -> None:
    """Old tokens are dropped from their codes, one by one; with eight bits the logits stay close."""
    found, (ids, mask) = model(), padded(5, 70)
    with assay.attach(found, name, budget=0.5):
        plain, _ = run(found, ids, mask, prompt=50)
    with assay.attach(found, name, "kivi", budget=0.5, bits=8, group=4, residual=4) as attached:
        packed, _ = run(found, ids, mask, prompt=50)
        assert attached.layers[0].lanes[0].keys.old > 10
        assert max(len(x.lanes[0]) for x in attached.layers) < 60
    close = (packed - plain)[mask.bool()].abs().max(-1)[0]
    assert close.median() < 0.01 * plain.std()


@pytest.mark.parametrize("shape", ["pyramid", (3.0, 2.0, 1.0), ((3.0, 1.0), (1.0, 3.0), (2.0, 2.0))])
def test_unequal_budgets_spend_the_same_total(shape) -> None:
    found, ids = model(), text(2, 61)
    with assay.attach(found, "h2o", budget=0.3, shape=shape) as attached, torch.no_grad():
        found(ids[:, :60], use_cache=True)
        kept = [[len(lane) for lane in layer.lanes] for layer in attached.layers]
        sizes = [layer.nbytes for layer in attached.layers]
        found(ids[:, 60:], past_key_values=attached.cache, use_cache=True)
    if isinstance(shape, tuple) and isinstance(shape[0], tuple):
        assert kept == [[27, 9], [9, 27], [18, 18]]
        assert sizes[0] == sizes[1] == sizes[2], "a head's smaller budget must free memory"
    elif shape == "pyramid":
        assert sum(x[0] for x in kept) == 54
        assert kept[0] > kept[1] > kept[2]
    else:
        assert kept == [[27], [18], [9]]


def test_unequal_heads_are_masked_heads() -> None:
    """Equal weights by head keep what one weight for all keeps."""
    found, (ids, mask) = model(), padded(5)
    same = tuple((1.0, 1.0) for _ in range(3))
    results = []
    for shape in ("uniform", same):
        with assay.attach(found, "h2o", budget=0.4, shape=shape):
            results.append(run(found, ids, mask)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_second_turn_is_a_prompt_again() -> None:
    found, ids = model(), text(1, 80)
    with assay.attach(found, "snapkv", budget=0.25) as attached, torch.no_grad():
        cache = found(ids[:, :40], use_cache=True).past_key_values
        assert len(attached.layers[0].lanes[0]) == 10
        found(ids[:, 40:], past_key_values=cache, use_cache=True)
        assert len(attached.layers[0].lanes[0]) == 20


def test_offloaded_keys_and_values_change_nothing_and_leave_the_device() -> None:
    """Nothing but labels and positions stays of the layers that read sparsely; rows can be reordered and chunks fed."""
    found, (ids, mask) = model(), padded(5, 60)
    options = {"read": 0.25, "least": 4, "dense": 1, "calibration": text(4)}
    results = []
    for offload in (False, True):
        with assay.attach(found, "double_sparsity", offload=offload, **options) as attached:
            logits, cache = run(found, ids, mask, prompt=50, chunk=20)
            cache.reorder_cache(torch.tensor([1, 0]))
            more = found(ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1] | 1], 1).flip(0), past_key_values=cache,
                         use_cache=True).logits  # fmt: skip
            results.append((logits, more, attached.nbytes, attached.away))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    moved, slots = results[1][3], 61
    assert results[0][3] == 0
    assert moved >= 2 * 2 * 2 * 2 * slots * 16 * 4, "keys and values of two layers, two rows, two heads"
    assert results[1][2] < results[0][2] - 2 * 2 * 2 * 2 * slots * 16 * 4 + 2 * 2 * 2 * 32 * 4 * 4
