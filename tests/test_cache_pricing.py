"""Prices of the cache: what is cheap is cheap, and the menu offers no level that another beats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import assay
from assay.cache_pricing import CachePrice, cache_menu, cache_prices
from assay.measure.text import windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError


@pytest.fixture(scope="module")
def prices() -> list[CachePrice]:
    folder = assay.builtin_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = windows(Checkpoint.open(folder), None, "calibration", 8 * 160, 160, model.config.vocab_size).ids
    return cache_prices(model, ids)


def test_fewer_bits_cost_more_nats_and_fewer_bytes(prices: list[CachePrice]) -> None:
    for side in ("keys", "values"):
        levels = ("exact", "fp8", "int4", "int2")
        nats = [sum(p.nats for p in prices if (p.side, p.level) == (side, level)) for level in levels]
        sizes = [sum(p.bytes_per_token for p in prices if (p.side, p.level) == (side, level)) for level in levels]
        assert nats[0] == 0 < nats[1]
        assert 3 * max(nats[1:3]) < nats[3]
        assert sizes[3] < sizes[2] < sizes[1] < 0.3 * sizes[0]


def test_prices_of_single_layers_add_up_to_that_of_all(prices: list[CachePrice]) -> None:
    """To first order, as the planner takes them: within a factor of two at four bits."""
    folder = assay.builtin_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = windows(Checkpoint.open(folder), None, "calibration", 8 * 160, 160, model.config.vocab_size).ids
    with torch.no_grad():
        dense = model(ids).logits[:, 120:].log_softmax(-1)
        with assay.attach(model, "kivi", bits=4) as attached:
            model(ids[:, :120], use_cache=True)
            found = model(ids[:, 120:], past_key_values=attached.cache, use_cache=True).logits.log_softmax(-1)
    whole = float((dense.exp() * (dense - found)).sum(-1).mean())
    assert 0.5 < whole / sum(p.nats for p in prices if p.level == "int4") < 2


def test_a_menu_has_no_useless_level() -> None:
    made = [CachePrice(0, "keys", *x) for x in (("exact", 8.0, 0.0), ("fp8", 4.0, 0.1), ("int4", 2.0, 0.05), ("int2", 1.0, 0.9))]
    assert cache_menu(made, 100, 3) == {(0, "keys"): [("exact", 2400, 0.0), ("int4", 600, 0.05), ("int2", 300, 0.9)]}


def test_refusals(prices: list[CachePrice]) -> None:
    model = AutoModelForCausalLM.from_pretrained(assay.builtin_model(), dtype=torch.float32).eval()
    with pytest.raises(InputError, match="there are fp8, int4, int2"):
        cache_prices(model, torch.zeros(1, 200, dtype=torch.long), ["int3"])
    with pytest.raises(InputError, match="128 tokens or more"):
        cache_prices(model, torch.zeros(1, 20, dtype=torch.long))


def test_the_file_beside_a_profile(tmp_path: Path) -> None:
    found = assay.price_cache(assay.builtin_model(), tmp_path)
    stored = json.loads((tmp_path / "cache.json").read_text())
    assert [CachePrice(**p) for p in stored["prices"]] == found
