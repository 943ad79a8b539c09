"""Prices of the cache: what is cheap is cheap, one layer's prices make those of all, and they stay beside the profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import assay
from assay.budget import caches
from assay.budget.caches import CachePrice
from assay.cache_pricing import cache_prices
from assay.caching import policies
from assay.measure.text import windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.prompted import Prompted
from assay.runtime.policy import Stack

DEPTH = 6


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(assay.builtin_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(model: PreTrainedModel) -> Tensor:
    return windows(Checkpoint.open(assay.builtin_model()), None, "calibration", 8 * 160, 160, model.config.vocab_size).ids


@pytest.fixture(scope="module")
def prices(model: PreTrainedModel, ids: Tensor) -> list[CachePrice]:
    return cache_prices(model, ids, ["fp8", "kivi4", "kivi2"], evict=["streaming_llm"])


def total(prices: list[CachePrice], side: str, level: str, depth: bool = True) -> float:
    return sum(p.nats for p in prices if (p.side, p.level) == (side, level) and (p.layer is not None) == depth)


def test_fewer_bits_cost_more_nats_and_fewer_bytes(prices: list[CachePrice]) -> None:
    for side in ("keys", "values"):
        levels = ("exact", "fp8", "kivi4", "kivi2")
        nats = [total(prices, side, level) for level in levels]
        sizes = [sum(p.bytes_per_token for p in prices if (p.side, p.level) == (side, level)) for level in levels]
        assert nats[0] == 0 < nats[1]
        assert 3 * max(nats[1:3]) < nats[3]
        assert sizes[3] < sizes[2] < sizes[1] < 0.6 * sizes[0]


def test_fewer_tokens_cost_more(prices: list[CachePrice]) -> None:
    found = [total(prices, "tokens", f"streaming_llm {share}") for share in ("0.5", "0.25", "0.12")]
    assert 0 < found[0] < found[1] < found[2]
    assert found[0] > total(prices, "keys", "kivi4") + total(prices, "values", "kivi4")


def test_other_engines_types_are_priced_as_they_store(prices: list[CachePrice]) -> None:
    """Eight bits in blocks of 32 beat eight-bit floats, and four bits lose to eight by far."""
    assert 20 * total(prices, "keys", "q8_0", False) < total(prices, "keys", "q4_0", False)
    assert total(prices, "keys", "q8_0", False) + total(prices, "values", "q8_0", False) < total(prices, "both", "fp8", False)


@pytest.mark.parametrize("level", ["kivi4", "kivi2"])
def test_prices_of_single_layers_add_up_to_that_of_all(
    level: str, model: PreTrainedModel, ids: Tensor, prices: list[CachePrice]
) -> None:
    """To first order, as the planner takes them: within a factor of two."""
    prompt = Prompted.of(model, ids)
    dense, _ = prompt.tail(Stack())
    found, _ = prompt.tail(Stack.of(policies([caches.Stored(level, level)] * DEPTH, None, "assay")))
    whole = float((dense.exp() * (dense - found)).sum(-1).mean())
    assert 0.5 < whole / (total(prices, "keys", level) + total(prices, "values", level)) < 2


def test_a_prompt_read_once_gives_what_the_model_gives(model: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad(), assay.attach(model, "snapkv", "fp8", budget=0.3):
        cache = model(ids[:, :120], use_cache=True).past_key_values
        meant = model(ids[:, 120:], past_key_values=cache, use_cache=True).logits.log_softmax(-1)
    snapkv, fp8 = (assay.attaching.named(name) for name in ("snapkv", "fp8"))  # type: ignore[attr-defined]
    found, _ = Prompted.of(model, ids).tail(Stack.of([snapkv(budget=0.3), fp8()]))
    assert torch.allclose(found, meant, atol=1e-4)


def test_refusals(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="there are fp8, kivi4, fireq4, cskv4, kivi2"):
        cache_prices(model, torch.zeros(1, 200, dtype=torch.long), ["int3"])
    with pytest.raises(InputError, match="128 tokens or more"):
        cache_prices(model, torch.zeros(1, 20, dtype=torch.long))


def test_the_file_beside_a_profile_is_checked(prices: list[CachePrice], tmp_path: Path) -> None:
    assert caches.load(tmp_path) is None
    caches.save(tmp_path, prices, {"text": "x"})
    assert caches.load(tmp_path) == prices
    stored = json.loads((tmp_path / "cache.json").read_text())
    stored["prices"][3]["nats"] /= 2
    (tmp_path / "cache.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="checksum is wrong"):
        caches.load(tmp_path)
