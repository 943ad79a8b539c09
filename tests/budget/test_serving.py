"""Memory of serving: the cache is what transformers really allocates, and budgets of memory are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SETTINGS, VOCABULARY, build
from tiny import save, text_file
from transformers import DynamicCache

import assay
from assay.budget import serving
from assay.budget.serving import Load, activation_bytes, cache_bytes, overheads, parse_tokens, room
from assay.engines.serving import SERVERS
from assay.measure.footprint import Footprint, LayerCache, footprint
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError

PLAIN = Footprint((LayerCache(128, 128),) * 4, 256, 512, 1000, None, 4096)
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "gpt_neox", "falcon", "bloom", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_what_transformers_allocates(family: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 8} if "gemma" in family or family == "mistral" else {}
    save(family, tmp_path / "m", **changes)
    _, model = build(family, **changes)
    length, batch = 24, 3
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(VOCABULARY, (batch, length)), past_key_values=cache, use_cache=True)
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    needs = footprint(StreamedModel(Checkpoint.open(tmp_path / "m")))
    by = SERVERS["transformers"]
    said = cache_bytes(needs, Load(length, batch), by, by.cache("fp16", "transformers"))
    # A sliding layer of transformers keeps one token less than its window, the one that comes next.
    missing = sum(batch * (layer.keys + layer.values) for layer in needs.layers if layer.window)
    assert said == 2 * (held + missing)
    assert bool(missing) == bool(changes)


def test_a_profile_says_so_where_the_cache_is_not_known(tmp_path: Path) -> None:
    save("mamba", tmp_path / "m")
    needs = footprint(StreamedModel(Checkpoint.open(tmp_path / "m")))
    with pytest.raises(InputError, match="mamba is not known"):
        overheads(needs, Load(32), "vllm")


def test_cache_types_cost_their_bytes_and_pages_are_whole() -> None:
    by = SERVERS["llama.cpp"]
    nbytes = {c.name: cache_bytes(PLAIN, Load(1024), by, c) for c in by.caches}
    elements = 4 * 1024 * 256
    assert nbytes == {"fp16": 2 * elements, "int8": elements // 32 * 34, "int4": elements // 32 * 18}
    assert cache_bytes(PLAIN, Load(1), by, by.caches[0]) == 4 * 256 * 256 * 2
    vllm = SERVERS["vllm"]
    assert cache_bytes(PLAIN, Load(1025, 2), vllm, vllm.caches[1]) == 2 * 4 * 1040 * 256


def test_latent_attention_is_cached_as_one_vector_where_the_engine_does_that() -> None:
    latent = Footprint((LayerCache(3072, 2048),) * 2, 256, 512, 1000, 576, None)
    for name, elements in (("vllm", 576), ("transformers", 5120)):
        by = SERVERS[name]
        assert cache_bytes(latent, Load(1600), by, by.caches[0]) == 2 * 2 * 1600 * elements


def test_windows_bound_the_cache() -> None:
    mixed = Footprint((LayerCache(128, 128, 512), LayerCache(128, 128)), 256, 512, 1000, None, None)
    by = SERVERS["vllm"]
    assert cache_bytes(mixed, Load(8192), by, by.caches[0]) == 2 * (512 + 8192) * 256
    assert cache_bytes(mixed, Load(256), by, by.caches[0]) == 2 * (256 + 256) * 256


def test_logits_or_the_mlp_are_the_widest_moment() -> None:
    assert activation_bytes(PLAIN, Load(4096), SERVERS["llama.cpp"]) == max(2 * 512 * (4 * 256 + 3 * 512), 4 * 512 * 1000)
    assert activation_bytes(PLAIN, Load(4096, 8), SERVERS["vllm"]) == 2 * 2048 * (4 * 256 + 3 * 512)


@pytest.mark.parametrize("text", ["32k", "32K", "32768", 32768, " 32 k "])
def test_contexts(text: str | int) -> None:
    assert parse_tokens(text) == 32768


@pytest.mark.parametrize("text", ["0", "-1", "-32k", "1.5k", "lots", "", "32kb"])
def test_contexts_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="tokens above zero"):
        parse_tokens(text)


def test_engines_that_decode_are_refused_with_those_that_do_not() -> None:
    with pytest.raises(InputError, match="decodes the weights .*--engine vllm"):
        room(PLAIN, Load(1024), "transformers", 10**9)
    with pytest.raises(InputError, match="--cache int4: vllm has fp16, fp8"):
        room(PLAIN, Load(1024, cache="int4"), "vllm", 10**9)
    with pytest.raises(InputError, match="--context 8192 is more than the 4096 tokens"):
        room(PLAIN, Load(8192), "vllm", 10**9)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    sizes = SETTINGS["llama"] | {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 4096}
    save("llama", folder / "m", **sizes)
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=1024, window=32)
    return folder / "p"


def test_a_budget_of_memory_is_kept_and_a_longer_context_leaves_less(profile: Path) -> None:
    needs = Footprint.from_json(assay.run.Profile.open(profile).index["footprint"])  # type: ignore[attr-defined]
    tight = sum(overheads(needs, Load(2048), "vllm").values()) + 300_000
    bits = []
    for context, cache in (("1k", "fp16"), ("2k", "fp16"), ("2k", "fp8")):
        plan = assay.plan(profile, memory=tight, context=context, cache=cache, engine="vllm")
        assert plan.serving["total"] == sum(plan.serving["bytes"].values()) <= tight
        assert plan.serving["bytes"]["weights"] == plan.nbytes_tensors
        assert f"--kv-cache-dtype {'auto' if cache == 'fp16' else 'fp8'}" in plan.serving["flags"]
        bits.append(plan.bits)
    assert bits[1] < bits[0]
    assert bits[1] < bits[2] <= bits[0]


def test_memory_that_is_too_small_is_refused_with_the_range_and_what_else_takes_it(profile: Path) -> None:
    with pytest.raises(InputError, match=r"1GB is out of reach; .* allow 1,6\d\d.* to 1,6.*cache, activations and engine"):
        assay.plan(profile, memory="1GB", context="1k", engine="vllm")


def test_a_context_beside_another_budget_is_reported(profile: Path) -> None:
    plan = assay.plan(profile, bits=5, context=64, cache="int4")
    assert "nbits" in plan.serving["flags"]
    decoded = sum(serving_names(profile).values())
    assert plan.serving["bytes"]["weights"] == decoded > plan.nbytes_tensors
    assert assay.plan(profile, bits=5).serving == {}


def serving_names(profile: Path) -> dict[str, int]:
    return dict(assay.run.Profile.open(profile).index["names"])  # type: ignore[attr-defined]


def test_more_bytes_are_said_to_buy_less_loss(profile: Path) -> None:
    plan = assay.plan(profile, bits=4.5)
    assert plan.more["predicted"] < plan.predicted
    again = assay.plan(profile, size=plan.nbytes_tensors + plan.more["bytes"] + 100_000)
    assert again.predicted <= plan.more["predicted"] * 1.001
    assert assay.plan(profile, bits=40).more == {}


def test_flags_of_every_engine_can_be_filled() -> None:
    for name in SERVERS:
        for cache in SERVERS[name].caches:
            made = serving.summary(PLAIN, Load(1024, 2, cache.name), name, 10, 20)
            assert cache.setting in made["flags"]
            assert "{context}" not in made["flags"]
