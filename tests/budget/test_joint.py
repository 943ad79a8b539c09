"""One budget for weights and cache: the best split of small tables, never above memory, never worse than two separate plans."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from budget.tables import LEVELS as LEVEL_NAMES
from budget.tables import damage, decision, extremes, menus, nbytes
from cli.calls import call
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save, text_file
from transformers import AutoModelForCausalLM

import assay
from assay import caching, contest, engines
from assay.budget import caches, joint, plans, serving
from assay.budget.caches import CacheChoice, CacheMenu, CachePrice, Stored
from assay.budget.plan import Plan
from assay.budget.planners import integer, lagrange, uniform
from assay.budget.serving import Load
from assay.engines.serving import SERVERS
from assay.measure.footprint import Footprint, LayerCache
from assay.measure.profile import Profile
from assay.model.errors import InputError
from assay.model.progress import Silent

LEVELS = {"fp8": (1.06, 1.0), "kivi4": (0.63, 3.0), "kivi2": (0.38, 60.0)}
"""Bytes an element and nats beside fp8's."""


def prices_for(depth: int, width: int, scale: float = 1e-4, heads: int = 2) -> list[CachePrice]:
    """Made-up prices: later layers cost more, values less than keys."""
    made = []
    for layer in range(depth):
        for side, part in (("keys", 1.0), ("values", 0.4)):
            made.append(CachePrice(layer, side, "exact", 2.0 * width, 0.0))
            for name, (size, nats) in LEVELS.items():
                waiting = 31 if name.startswith("kivi") else 0
                made.append(CachePrice(layer, side, name, size * width, scale * nats * part * (layer + 1), waiting))
        made.append(CachePrice(layer, "tokens", "1", 8.0, 0.0))
        made += [CachePrice(layer, "tokens", f"snapkv {s:g}", 4.0 + 4 * heads, scale / s * 5) for s in (0.5, 0.25)]
    every = [
        ("both", "fp8", 4.0),
        ("keys", "q8_0", 0.5),
        ("values", "q8_0", 0.2),
        ("keys", "q4_0", 30.0),
        ("values", "q4_0", 9.0),
    ]
    return made + [CachePrice(None, side, name, 0.0, scale * nats) for side, name, nats in every]


def footprint(depth: int = 2, width: int = 64) -> Footprint:
    return Footprint((LayerCache(width, width),) * depth, 128, 256, 500, None, 4096)


def menu(engine: str, depth: int = 2, context: int = 512, batch: int = 2) -> CacheMenu:
    return CacheMenu.of(prices_for(depth, 64), footprint(depth), Load(context, batch), engine)


@given(menus(3, 3, 200_000), st.sampled_from(["vllm", "llama.cpp", "assay"]), st.floats(0, 1), st.floats(-6, 2))
@settings(max_examples=60)
def test_the_split_is_the_best_of_all_on_small_tables(decisions: list, engine: str, share: float, power: float) -> None:
    found = menu(engine)
    scaled = [p if p.nats == 0 else CachePrice(**vars(p) | {"nats": p.nats * 10**power}) for p in found.prices.values()]
    found = CacheMenu.of(scaled, found.footprint, found.load, engine)
    types = list(found.types)
    alike = {"all": [[(t, t)] * 2 for t in types], "sides": [[p] * 2 for p in itertools.product(types, repeat=2)],
             "none": list(itertools.product(itertools.product(types, repeat=2), repeat=2))}[found.server.alike]  # fmt: skip
    every = [found.choice([Stored(*pair) for pair in layers], None) for layers in alike]
    low, high = extremes(decisions)
    smallest, largest = min(c.nbytes for c in every), max(c.nbytes for c in every)
    total = smallest + low + int(share * (largest + high - smallest - low))

    def loss(choice: list[int]) -> float:
        return damage(decisions, choice)

    best = joint.divide(decisions, found.choices(), lambda c: total - c.nbytes, loss, integer.plan)[0]
    assert nbytes(decisions, best.choice) + best.cache.nbytes <= total
    brute = min(
        damage(decisions, choice) + c.nats
        for c in every for choice in itertools.product(*(range(len(d.options)) for d in decisions))
        if nbytes(decisions, choice) + c.nbytes <= total
    )  # fmt: skip
    hull = joint.divide(decisions, found.choices(), lambda c: total - c.nbytes, loss, lagrange.plan)
    assert min(best.loss, hull[0].loss) >= brute * (1 - 1e-9) - 1e-15
    if len(hull) <= joint.SHORTLIST:
        assert best.loss <= brute * (1 + 1e-6) + 1e-12


@given(menus(4, 4), st.floats(0, 1))
@settings(max_examples=40)
def test_no_pair_of_separate_plans_is_better(decisions: list, share: float) -> None:
    found, (low, high) = menu("assay", 3), extremes(decisions)
    uniform = found.uniform()
    least = min(c.nbytes for c in uniform)
    total = least + low + int(share * (max(c.nbytes for c in uniform) + high - least - low))
    offered = [*found.choices(), *uniform]
    best = joint.divide(decisions, offered, lambda c: total - c.nbytes, lambda x: damage(decisions, x), lagrange.plan)[0]
    for cache in uniform:
        if total - cache.nbytes >= low:
            assert best.loss <= damage(decisions, lagrange.plan(decisions, total - cache.nbytes)) + cache.nats + 1e-12


def test_the_split_is_of_the_planner_that_was_asked_for() -> None:
    offered = menu("assay").choices()
    for seed in range(10):
        drawn = random.Random(seed)
        damages = [[10 ** drawn.uniform(-3, 1) for _ in range(4)] for _ in range(4)]
        decisions = [decision(i, drawn.sample(range(1000, 200_000), 5), damages[i], LEVEL_NAMES[:4], True) for i in range(4)]
        total = min(c.nbytes for c in offered) + sum(extremes(decisions)) // 2
        best = joint.divide(decisions, offered, lambda c, t=total: t - c.nbytes, partial(damage, decisions), uniform.plan)[0]
        assert best.choice == uniform.plan(decisions, total - best.cache.nbytes)


def test_the_front_of_caches_is_that_of_all_mixtures() -> None:
    found = menu("assay", 2)
    pairs = list(itertools.product(found.types, repeat=2))
    every = [found.choice([Stored(*a), Stored(*b)], None) for a, b in itertools.product(pairs, repeat=2)]
    front = found.choices()
    assert [c.nbytes for c in front] == sorted(c.nbytes for c in front)
    for cache in every:
        assert any(c.nbytes <= cache.nbytes and c.nats <= cache.nats + 1e-15 for c in front)


def test_many_layers_are_thinned_and_keep_both_ends() -> None:
    found = menu("assay", 40)
    front = found.choices()
    assert caches.MOST_POINTS / 8 < len(front) <= caches.MOST_POINTS + len(found.uniform())
    assert front[-1].lossless
    assert all(s == Stored("kivi2", "kivi2") for s in front[0].layers)


def test_tokens_are_dropped_only_where_that_is_allowed() -> None:
    found = menu("assay")
    assert all(s.share == 1 for c in found.choices() for s in c.layers)
    assert any(s.share < 1 for c in found.choices("snapkv") for s in c.layers)
    with pytest.raises(InputError, match="the profile has prices for snapkv"):
        found.choices("h2o")
    with pytest.raises(InputError, match="vllm drops no tokens; --engine assay does"):
        menu("vllm").choices("snapkv")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 4096, "num_hidden_layers": 3}
    save("llama", folder / "m", **sizes)
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=1024, window=32)
    needs = Footprint.from_json(Profile.open(folder / "p").index["footprint"])
    caches.save(folder / "p", prices_for(3, needs.layers[0].keys), {})
    return folder / "p"


def planned(profile: Path, engine: str, share: float, **more: object) -> tuple[Plan, int]:
    """A plan for a share of the way between the least and the most memory that make sense."""
    with pytest.raises(InputError, match="out of reach") as error:
        assay.plan(profile, memory="300MB", context=2048, batch=8, engine=engine, **more)
    low = float(str(error.value).split("allow ")[1].split(" to ")[0].replace(",", "")) * 1e6
    memory = int(low + 10_000 + share * 12e6)
    return assay.plan(profile, memory=memory, context=2048, batch=8, engine=engine, **more), memory


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "assay"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 1.0])
def test_memory_is_kept_and_no_single_cache_is_better(profile: Path, engine: str, share: float) -> None:
    if engine == "llama.cpp" and "refused" in Profile.open(profile).index["gguf"]:
        pytest.skip("this model has no GGUF")
    plan, memory = planned(profile, engine, share)
    assert plan.serving["total"] == sum(plan.serving["bytes"].values()) <= memory
    assert plan.cache["predicted"] == pytest.approx(plan.predicted + plan.cache["nats"])
    assert plan.cache["predicted_low"] <= plan.cache["predicted"] <= plan.cache["predicted_high"]
    assert plan.cache["alone"]
    for name in plan.cache["alone"]:
        pinned = assay.plan(profile, memory=memory, context=2048, batch=8, engine=engine, cache=name)
        assert plan.cache["predicted"] <= pinned.cache["predicted"] + 1e-12
        assert pinned.serving["total"] <= memory


@pytest.mark.parametrize("engine", ["vllm", "assay"])
def test_a_plan_goes_through_its_file(profile: Path, engine: str, tmp_path: Path) -> None:
    plan, _ = planned(profile, engine, 0.05)
    plan.save(tmp_path / "p.yaml")
    again = plans.checked(Profile.open(profile), Plan.load(tmp_path / "p.yaml"), engines.get(engine))
    assert again == dataclasses.replace(plan, cache=dict(plan.cache) | {"alone": {}})
    assert plan.to_text() == planned(profile, engine, 0.05)[0].to_text()


def test_an_edited_cache_is_priced_anew_and_checked(profile: Path, tmp_path: Path) -> None:
    plan, _ = planned(profile, "assay", 0.05)

    def edited(**change: object) -> Plan:
        path = tmp_path / "p.yaml"
        Plan(**vars(plan) | {"cache": dict(plan.cache) | change}).save(path)
        return plans.checked(Profile.open(profile), Plan.load(path), engines.get("assay"))

    made = edited(layers=["fp8 fp8", "kivi4 fp16", "fp16 fp16"])
    assert made.cache["nats"] == pytest.approx(1e-4 * (1.4 + 6))
    assert made.serving["bytes"]["cache"] != plan.serving["bytes"]["cache"]
    with pytest.raises(InputError, match="cache int3: assay has fp16, fp8, kivi4, kivi2"):
        edited(layers=["fp8 int3"] * 3)
    with pytest.raises(InputError, match="the cache of 2 layers for a model of 3"):
        edited(layers=["fp8 fp8"] * 2)
    with pytest.raises(InputError, match="write the types of keys and values"):
        edited(layers=["fp8"] * 3)
    with pytest.raises(InputError, match="drops tokens; name the policy"):
        edited(layers=["fp8 fp8 0.5"] * 3)


@pytest.mark.parametrize("planner", ["lagrange", "bisection", "uniform"])
def test_more_memory_buys_what_the_plan_said(profile: Path, planner: str) -> None:
    asked = {"context": 2048, "batch": 8, "engine": "assay", "cache": "fp8", "planner": planner}
    with pytest.raises(InputError, match="out of reach") as error:
        assay.plan(profile, memory="300MB", **asked)
    memory = int(float(str(error.value).split("allow ")[1].split(" to ")[0].replace(",", "")) * 1e6) + 350_000
    plan = assay.plan(profile, memory=memory, **asked)
    more = assay.plan(profile, memory=memory + (plan.more or {"bytes": plan.nbytes_tensors // 8})["bytes"], **asked)
    assert more.predicted == (plan.more["predicted"] if plan.more else plan.predicted)
    assert plan.gap < 0.05 or planner != "lagrange"


def test_a_search_keeps_to_the_memory(profile: Path) -> None:
    plan, memory = planned(profile, "assay", 0.02)
    contract = engines.get("assay")
    made = plans.changed(
        Profile.open(profile), plan, contract, (), lambda d, limit, choice: (tuple(lagrange.plan(d, limit)), 1.0)
    )
    assert made.serving["total"] <= memory and made.predicted == plan.predicted


@pytest.mark.parametrize("better", ["mixed", "uniform"])
def test_a_contest_corrects_the_promise_of_both_together(
    profile: Path, better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, (plan, _) = Profile.open(profile), planned(profile, "assay", 0.02)
    twin = plans.uniform_twin(opened, plan, engines.get("assay"), ())
    assert twin is not None and plan.cache["nats"] and twin.predicted > plan.predicted
    measured = {id(twin): 2 * twin.predicted}
    monkeypatch.setattr(contest, "execute", lambda model, plan, *rest: plan)
    monkeypatch.setattr(contest._HeldOut, "kl", lambda self, done: measured.get(id(done), 9.0 if better == "uniform" else 0.0))
    used, _ = contest.solve_better(None, opened, plan, twin, tmp_path, Silent(), False)
    both = f"{joint.SAID}{used.predicted + used.cache['nats']:.4f} ("
    assert used.predicted == pytest.approx(2 * (twin if better == "uniform" else plan).predicted)
    assert used.cache["predicted"] == pytest.approx(used.predicted + used.cache["nats"])
    assert used.sentence.startswith(f"predicted KL {used.predicted:.4f} nats/token") and both in used.sentence
    assert ("the uniform plan measured better" in used.sentence) == (better == "uniform")
    tuned = plans.polished(used, {"before": 0.2, "after": 0.1, "used": True}).sentence
    assert "; polished on held-out text from 0.2000 to 0.1000" in tuned and tuned.count(joint.SAID) == 1
    assert ("the uniform plan measured better" in tuned) == (better == "uniform")


def test_a_bound_on_the_loss_is_of_weights_and_cache_together(profile: Path) -> None:
    asked = {"context": 2048, "batch": 8, "engine": "assay"}
    plan = assay.plan(profile, max_loss=0.01, cache="fp8", **asked)
    assert plan.cache["nats"] and plan.predicted_high < plan.cache["predicted_high"] <= 0.01
    with pytest.raises(InputError, match=r"--max-loss 0\.01 leaves nothing for the weights: kivi2 alone may cost 0\."):
        assay.plan(profile, max_loss=0.01, cache="kivi2", **asked)


def test_flags_are_those_of_the_choice(profile: Path) -> None:
    def flags(engine: str, cache: str) -> str:
        plan = assay.plan(profile, bits=6, context=64, engine=engine, cache=cache)
        return str(plan.serving["flags"])

    assert flags("vllm", "fp8").endswith("--kv-cache-dtype fp8")
    assert flags("vllm", "fp16").endswith("--kv-cache-dtype auto")
    assert (
        flags("assay", "kivi4")
        == "model = assay.load(OUT); with assay.attach(model, *assay.planned_cache(OUT)): model.generate(...)"
    )
    assert flags("assay", "fp16") == "model = assay.load(OUT); model.generate(...)"
    split = CacheChoice((Stored("int8", "int4"),) * 2, None, 100, 0.0)
    made = serving.summary(footprint(), Load(64), "llama.cpp", 1, 1, split)
    assert made["flags"].endswith("--cache-type-k q8_0 --cache-type-v q4_0")


def test_the_command_says_the_cache_its_loss_and_how_to_run_it(
    profile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, memory = planned(profile, "vllm", 0.02)
    line = ("plan", profile, "--memory", memory, "--context", "2k", "--batch", "8", "--engine", "vllm")
    code, out, err = call(capfd, *line, "-o", tmp_path / "a.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["cache"] == plan.cache
    code, out, err = call(capfd, *line, "-o", tmp_path / "b.yaml")
    assert code == 0, err
    assert "--kv-cache-dtype fp8" in out
    assert "in this memory with one cache type for all layers:" in out
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


def test_what_is_asked_for_without_prices_or_memory_is_refused(profile: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--cache auto needs --memory"):
        assay.plan(profile, bits=5, context=64, cache="auto")
    with pytest.raises(InputError, match="--evict needs --memory and --cache auto"):
        assay.plan(profile, memory="2GB", context=64, cache="fp8", evict="snapkv", engine="vllm")
    with pytest.raises(InputError, match="--cache int3: vllm has fp16, fp8|cache int3: vllm has fp16, fp8"):
        assay.plan(profile, memory="2GB", context=64, cache="int3", engine="vllm")
    prices = (profile / caches.FILE).read_bytes()
    (profile / caches.FILE).unlink()
    with pytest.raises(InputError, match="--cache auto needs prices of the cache; run assay profile with --cache"):
        assay.plan(profile, memory="2GB", context=64, cache="auto", engine="vllm")
    assert assay.plan(profile, memory="2GB", context=64, engine="vllm").cache == {}
    (profile / caches.FILE).write_bytes(prices)


def test_the_cache_holds_no_more_than_was_promised() -> None:
    """Bytes of every storage of a real cache in bf16 at the full context, below what a plan counts, and not far."""
    model = AutoModelForCausalLM.from_pretrained(assay.builtin_model(), dtype=torch.bfloat16).eval()
    own = [p for p in prices_for(6, 128) if p.layer is not None]
    real = {"fp8": 128 + 4, "kivi4": 84, "kivi2": 52}
    exact = [p if p.level not in real else CachePrice(**vars(p) | {"bytes_per_token": real[p.level]}) for p in own]
    needs = Footprint((LayerCache(128, 128),) * 6, 256, 768, 2048, None, 1024)
    found = CacheMenu.of(exact, needs, Load(400, 2), "assay")
    layers = [
        Stored("kivi4", "fp8"),
        Stored("kivi2", "kivi2"),
        Stored(),
        Stored("fp8", "kivi4"),
        Stored("fp16", "kivi4"),
        Stored(),
    ]
    promised = found.choice(layers, None)
    policies = caching.policies(layers, None, "assay")
    with torch.no_grad(), assay.attach(model, *policies) as attached:
        ids = torch.randint(2048, (2, 400), generator=torch.Generator().manual_seed(0))
        cache = model(ids[:, :380], use_cache=True).past_key_values
        for i in range(380, 400):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        assert attached.nbytes <= promised.nbytes < 1.25 * attached.nbytes


def test_every_engine_s_types_stand_for_priced_levels() -> None:
    simulated, own = caching.engine_levels(), caching.levels()
    for name, by in SERVERS.items():
        assert {c.price for c in by.caches} <= {"exact", *simulated, *own}, name
