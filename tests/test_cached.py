"""A plan of weights and cache carried out: the folder says it, `planned_cache` attaches it, `verify` measures both together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from budget.test_joint import prices_for
from families import VOCABULARY
from tiny import save, text_file

import assay
from assay.budget import caches
from assay.budget.plan import Plan
from assay.caching import Planned
from assay.model.errors import InputError
from assay.runtime.tape import bytes_of

DEPTH, WIDTH = 3, 128
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": DEPTH, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    save("llama", folder / "m", **SIZES)
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=2048, window=64)
    caches.save(folder / "p", prices_for(DEPTH, WIDTH, 1e-3), {})
    return folder


def made(room: Path, engine: str, plan: Plan) -> Path:
    out = room / f"out-{engine}"
    if not out.exists():
        assay.compress(room / "m", out, plan=plan, profile=room / "p")
    return out


@pytest.mark.parametrize("engine", ["assay", "vllm"])
def test_verify_measures_weights_and_cache_together(room: Path, engine: str) -> None:
    plan = assay.plan(room / "p", bits=6, context=512, engine=engine, cache={"assay": "kivi2", "vllm": "fp8"}[engine])
    out = made(room, engine, plan)
    assert Plan.load(out / "assay" / "plan.yaml").cache == plan.cache
    found = assay.verify(out, room / "m", text=None, tokens=2048, window=128)["joint"]
    assert found["cache"] == {"assay": "kivi2", "vllm": "fp8"}[engine]
    assert found["simulated"] == (engine != "assay")
    assert 0 < found["weights"] < found["measured"]
    assert found["tokens"] == 16 * 32
    assert found["predicted"] == plan.cache["predicted"]


def test_a_bound_is_kept_by_weights_and_cache_together(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(room, "bound", assay.plan(room / "p", max_loss=0.1, context=512, engine="assay", cache="fp8"))
    measured: dict[str, object] = {}
    monkeypatch.setattr("assay.cached.measured", lambda *given: measured or None)
    judged = {"text": None, "tokens": 256, "window": 64}
    assert assay.verify(out, room / "m", **judged)["passed"]
    measured |= {"refused": "no"}
    assert assay.verify(out, room / "m", **judged)["passed"]
    measured |= {"measured": 0.11}
    assert not assay.verify(out, room / "m", **judged)["passed"]


def test_what_is_planned_is_what_is_attached(room: Path) -> None:
    plan = assay.plan(room / "p", bits=6, context=512, engine="assay", cache="kivi2")
    out = made(room, "assay", plan)
    (policy,) = assay.planned_cache(out)
    assert isinstance(policy, Planned)
    model = assay.load(out)
    ids = torch.randint(VOCABULARY, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with assay.attach(model, *assay.planned_cache(out / "assay" / "plan.yaml")) as ours:
            meant = model(ids[:, :64], use_cache=True).past_key_values
            first = model(ids[:, 64:], past_key_values=meant, use_cache=True).logits
        with assay.attach(model, "kivi", bits=2):
            cache = model(ids[:, :64], use_cache=True).past_key_values
            second = model(ids[:, 64:], past_key_values=cache, use_cache=True).logits
        dense = model(ids, use_cache=False).logits[:, 64:]
    assert torch.equal(first, second)
    assert not torch.allclose(first, dense, atol=1e-4)
    assert ours.nbytes > 0


def test_weights_that_run_take_no_more_memory_than_was_promised(room: Path) -> None:
    plan = assay.plan(room / "p", bits=6, context=512, engine="assay", cache="kivi2")
    model = assay.load(made(room, "assay", plan))
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if "packed" in vars(module):
            held += [t for t in vars(module.packed).values() if torch.is_tensor(t)]
    taken = bytes_of(held)
    promised = plan.serving["bytes"]["weights"]
    assert 0.7 * promised < taken <= promised * 1.01


def test_a_plan_without_a_cache_has_nothing_to_attach(room: Path) -> None:
    with pytest.raises(InputError, match="states no cache"):
        assay.planned_cache(assay.plan(room / "p", bits=6))
    with pytest.raises(InputError, match="leaves the cache as it is"):
        assay.planned_cache(assay.plan(room / "p", bits=6, context=64, engine="assay", cache="fp16"))


def test_levels_that_need_text_say_so_and_dropping_is_per_layer() -> None:
    layers = [caches.Stored("cskv4", "fp8"), caches.Stored("fp16", "kivi4", 0.5), caches.Stored()]
    evictor, packer = assay.planned_cache(_plan(layers, "streaming_llm"))
    assert packer.needs == ("calibration",)
    assert evictor.shape == (1.0, 0.5, 1.0)
    assert evictor.budget == pytest.approx(2.5 / 3)
    assert packer.sides(2) == (None, None)
    keys, values = packer.sides(1)
    assert keys is None
    assert values is not None
    with pytest.raises(InputError, match="cache int3: assay has fp16, fp8, kivi4"):
        assay.planned_cache(_plan([caches.Stored("int3")], None))


def _plan(layers: list[caches.Stored], evict: str | None) -> Plan:
    cache = {"layers": [str(one) for one in layers], "evict": evict, "nats": 1.0}
    return Plan("m", "p", "assay", "two_sided", {"bits": 4}, {}, 0, 4.0, 4.0, 0.1, 0.0, 0.2, {}, 0.0, "", cache=cache)
