"""Experts: stacked in the source, and starved by the calibration text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import real_gguf as real
from families import WRITTEN, build
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny import LETTERS, save, text_file
from transformers import AutoModelForCausalLM

import assay
from assay.engines.vllm_rules import problems
from assay.measure.experts import ENOUGH_TOKENS, Typical
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.methods import base
from assay.model.arch import facts
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.progress import Silent
from assay.model.sites import survey
from assay.profiling import Scope, make_profile

SETTINGS = {"calibration": "text.txt", "tokens": 1024, "window": 32}
WIDE = {"moe_intermediate_size": 64}
LATENT = WRITTEN["llama"] | {
    "num_key_value_heads": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
"""Families whose first block has no experts."""
RARE, STARVED, EXPERTS = "w", 4, 8


def stack(folder: Path) -> Path:
    """The same model, its experts stored as 3-D tensors, as transformers holds them."""
    out = folder.with_name(f"{folder.name}-stacked")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, save_original_format=False)
    for path in folder.glob("tokenizer*"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", facts()["apart"])
def test_stacked_experts_are_read_under_the_names_of_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("families.WRITTEN", {family: LATENT} | WRITTEN)

    apart = Checkpoint.open(save(family, tmp_path / "m"))
    stacked = Checkpoint.open(stack(tmp_path / "m"))
    assert any(len(t.shape) == 3 for t in stored(stacked.folder).values())
    assert stacked.names == apart.names
    assert all(torch.equal(stacked.read(n), apart.read(n)) for n in apart.names)
    assert survey(stacked).sites == survey(apart).sites
    assert sum(i.nbytes for i in stacked.stored.values()) == sum(i.nbytes for i in apart.stored.values())


@pytest.mark.parametrize(
    ("family", "engine", "level"),
    [
        ("qwen3_moe", "vllm", "int4-g32-sym"), ("mixtral", "gptq", "int4-g32-sym"), ("mixtral", "assay", "nf4-g32"),
    ],
)  # fmt: skip
def test_stacked_experts_become_what_single_ones_do(tmp_path: Path, family: str, engine: str, level: str) -> None:
    made, settings = [], SETTINGS | {"calibration": text_file(tmp_path)}
    for model in (save(family, tmp_path / "m", **WIDE if family == "qwen3_moe" else {}), stack(tmp_path / "m")):
        out = model.with_name(f"{model.name}-out")
        report = assay.compress(model, out, engine=engine, level=level, **settings)
        assert report["ledger"]["planned"] == 2 * (4 + 3 * 4) and problems(Checkpoint.open(out)) == []
        made.append(stored(out))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][n].view(torch.uint8), made[1][n].view(torch.uint8)) for n in made[0])
    assert not any(t.ndim == 3 for t in made[1].values())


def test_stacked_experts_become_stacked_tensors_of_a_gguf_file(tmp_path: Path) -> None:
    real.lively("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=256, head_dim=64)
    settings = SETTINGS | {"calibration": text_file(tmp_path), "engine": "llama.cpp", "level": "q4_k", "method": "nearest"}
    files = []
    for model in (tmp_path / "m", stack(tmp_path / "m")):
        out = model.with_name(f"{model.name}-out")
        assay.compress(model, out, **settings)
        files.append({t.name: t for t in GGUFReader(out / "model.gguf").tensors})
    assert files[0].keys() == files[1].keys()
    assert all((files[0][n].data == files[1][n].data).all() for n in files[0])
    found = files[1]["blk.1.ffn_down_exps.weight"]
    assert found.tensor_type.name == "Q4_K" and list(found.shape) == [256, 256, 4]


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_experts_stored_inputs_first_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    settings = WRITTEN["mixtral"] | {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "intermediate_size_mlp": 96}
    monkeypatch.setattr("families.WRITTEN", {family: settings} | WRITTEN)
    source = Checkpoint.open(save(family, tmp_path / "m"))
    kept = survey(source).kept
    experts = [n for n in source.names if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 4 and {kept[n] for n in experts} == {"experts stored as one 3-D tensor"}
    options = SETTINGS | {"calibration": text_file(tmp_path), "method": "nearest", "level": "int4-g32-sym"}
    assay.compress(tmp_path / "m", tmp_path / "out", engine="assay", **options)
    written = Checkpoint.open(tmp_path / "out")
    assert len(written.levels) >= 8 and all(torch.equal(written.read(n), source.read(n)) for n in experts)
    ids = torch.arange(3, 40)[None]
    assert assay.load(tmp_path / "out")(ids).logits.isfinite().all()
    with pytest.raises(InputError, match="loses the experts"):
        assay.compress(tmp_path / "m", tmp_path / "no", engine="transformers", **options)


def test_experts_in_another_order_are_left_as_they_are(tmp_path: Path) -> None:
    _, model = build("qwen3_moe")
    model.config.model_type = "qwen3_moe"
    model.save_pretrained(tmp_path / "m", save_original_format=False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "llama4_text"}))
    assert any(name.endswith("experts.gate_up_proj") for name in Checkpoint.open(tmp_path / "m").names)


# ---- starved experts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` in whose first layer one expert is for one rare letter only, and its profile `p`."""
    folder = tmp_path_factory.mktemp("starving")
    changes = {"num_experts": EXPERTS, "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_experts_per_tok": 2}
    save("qwen3_moe", folder / "m", **changes)
    tensors, generator = stored(folder / "m"), torch.Generator().manual_seed(7)
    seen = tensors["model.embed_tokens.weight"][: len(LETTERS) + 1]
    wanted = torch.full((len(seen),), -8.0)
    wanted[1 + LETTERS.index(RARE)] = 8.0
    for layer in range(3):
        router = 0.2 * torch.randn(EXPERTS, 64, generator=generator)
        if layer == 0:
            router[STARVED] = torch.linalg.lstsq(seen / seen.norm(dim=1, keepdim=True) * 8, wanted).solution
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = router
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1e-3
    save_file(tensors, folder / "m" / "model.safetensors", {"format": "pt"})
    assay.profile(folder / "m", folder / "p", calibration=text_file(folder), tokens=2048, window=32)
    return folder


def tokens(folder: Path) -> dict[str, int]:
    profile = Profile.open(folder / "p")
    names = [n for n in profile.prices if ".experts." in n]
    return {n: profile.curvatures(int(n.split(".")[2])).tokens(n) for n in names}


def test_the_profile_counts_what_each_expert_met(starving: Path) -> None:
    poor = {n for n, count in tokens(starving).items() if count < ENOUGH_TOKENS}
    assert poor == {f"model.layers.0.mlp.experts.{STARVED}.{m}_proj.weight" for m in ("gate", "up", "down")}
    assert all(tokens(starving)[n] > 0 for n in poor)


def test_a_starved_expert_gets_no_fewer_bits_than_the_others_of_its_layer(starving: Path) -> None:
    prices = Profile.open(starving / "p").prices
    for part in ("gate", "up", "down"):
        names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(EXPERTS)]
        costs = [prices[n]["int4-g32-sym"]["two_sided"] for n in names]
        assert costs[STARVED] >= sum(costs) / len(costs)
    plan = assay.plan(starving / "p", bits=4.0, engine="assay")
    given = {n: Level.parse(c.level).bits for n, c in plan.choices.items() if c.level and n.startswith("model.layers.0.mlp.exp")}
    own = [bits for n, bits in given.items() if f".experts.{STARVED}." in n]
    others = [bits for n, bits in given.items() if f".experts.{STARVED}." not in n]
    assert sum(own) / len(own) >= sum(others) / len(others)


def test_by_its_own_few_tokens_it_would_have_got_fewer(starving: Path) -> None:
    """What the test above would miss: the price from the expert's own statistics is far below the one it gets."""
    profile, anatomy = Profile.open(starving / "p"), survey(Checkpoint.open(starving / "m"))
    curvatures = profile.curvatures(0)
    typical = Typical.of(curvatures, anatomy.block_sites(0))
    for site in (s for s in anatomy.block_sites(0) if s.expert is not None):
        stand_in = typical.standing_in(site, curvatures[site.name])
        assert (stand_in is None) is (site.expert != STARVED)
        if stand_in is not None:
            change = 0.01 * torch.randn(site.shape, generator=torch.Generator().manual_seed(0))
            assert curvatures[site.name].damage(change) < stand_in.damage(change)


def test_a_starved_expert_is_rounded_without_its_statistics_and_the_ledger_says_so(starving: Path, tmp_path: Path) -> None:
    report = assay.compress(starving / "m", tmp_path / "out", profile=starving / "p", level="int4-g32-sym", engine="vllm")
    rows = {r["tensor"]: r for r in json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())}
    fallen = {name for name, row in rows.items() if row["fate"] == "fell_back"}
    counts = tokens(starving)
    assert fallen == {n for n, count in counts.items() if count < ENOUGH_TOKENS} and report["ledger"]["fell_back"] == 3
    assert all(rows[n]["reason"] == f"{counts[n]} calibration tokens met it, fewer than {ENOUGH_TOKENS}" for n in fallen)
    source, written = Checkpoint.open(starving / "m"), Checkpoint.open(tmp_path / "out")
    method = base.get("two_sided")()
    for name in (*fallen, "model.layers.0.mlp.experts.0.up_proj.weight"):
        plain = method.encode(source.read(name)[None], Level.parse("int4-g32-sym"), torch.float32, base.Statistics())[0]
        assert torch.equal(written.read(name), plain.decode()) is (name in fallen)


# ---- parts of the text -------------------------------------------------------------------------


def in_batches(folder: Path, tokens: int, **more: Any) -> Profile:
    """A profile in batches of so many tokens, eight parts of the text being 128 tokens each."""
    streamed = StreamedModel(Checkpoint.open(folder), batch_tokens=tokens)
    calibration, out = text_file(folder.parent), folder.with_name(f"{folder.name}-in-{tokens}")
    return make_profile(streamed, out, calibration, 1024, 32, 0, Silent(), **more)


def test_an_expert_that_no_token_of_a_part_met_is_left_out_of_the_spreads(tmp_path: Path) -> None:
    found = in_batches(save("qwen3_moe", tmp_path / "m", num_experts=32, num_local_experts=32), 128)
    sites = {row["name"]: row["expert"] for row in found.index["rows"] if row["block"] is not None}
    experts = {name for name, expert in sites.items() if expert is not None}
    assert {len(values) for values in found.index["spread"].values()} == {8}
    assert sites.keys() - experts <= found.index["spread"].keys() and experts - found.index["spread"].keys()
    assert experts <= found.prices.keys()


@pytest.mark.parametrize("family", ["opt", "gpt2"])
@pytest.mark.parametrize("sparing", [True, False])
def test_products_of_flattened_windows_count_for_the_parts_that_these_are_in(tmp_path: Path, family: str, sparing: bool) -> None:
    model, more = save(family, tmp_path / "m"), {"scope": Scope(("gptq",), sparing=sparing)}
    by_part, by_text = (in_batches(model, tokens, **more).index["spread"] for tokens in (128, 1024))
    assert by_part.keys() == by_text.keys() and {len(values) for values in by_text.values()} == {8}
    for name, values in by_part.items():
        assert by_text[name] == pytest.approx(values, rel=0.02), name
