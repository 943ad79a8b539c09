"""The main job on every family and on a trained model: what was planned is what the files hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from families import CAUSAL
from tiny import save, text_file
from transformers import AutoModelForCausalLM

import assay
from assay import execute as execution
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError

PEBBLE = Path(__file__).resolve().parents[2] / "shared" / "models" / "pebble"
REFUSED = {"gpt2": "Conv1D", "mixtral": "experts", "qwen3_moe": "experts", "falcon": "open", "mamba": "open"}
SMALL = {"tokens": 1024, "window": 32}


@pytest.fixture(params=CAUSAL)
def family(request, tmp_path: Path):
    return request.param, save(request.param, tmp_path / "m"), text_file(tmp_path), tmp_path


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_family_is_compressed_and_loads_as_simulated(family) -> None:
    name, model, text, folder = family
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            assay.compress(model, folder / "out", bits=4.7, calibration=text, **SMALL)
        return
    report = assay.compress(model, folder / "out", bits=4.7, calibration=text, **SMALL)
    counts = report["ledger"]
    assert counts["done"] == counts["planned"] > 0
    ledger = json.loads((folder / "out" / "assay" / "ledger.json").read_text())
    assert {row["tensor"] for row in ledger} == set(Checkpoint.open(model).names)
    assert all(row["reason"] for row in ledger)
    simulated = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    result = Checkpoint.open(folder / "out")
    with torch.no_grad():
        for key, parameter in simulated.named_parameters():
            if key in result.levels:
                parameter.copy_(result.read(key))
        ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
        loaded = assay.load(folder / "out").eval()
        torch.testing.assert_close(loaded(ids).logits, simulated(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "method", "level"), [
    ("llama", "trellis", "trellis3.25-channel"), ("gpt2", "trellis", "trellis4-channel"), ("gemma2", "gptq", "nf4-g32"),
    ("qwen3_moe", "two_sided", "int3-g32-asym"), ("mamba", "trellis", "trellis5-channel"), ("opt", "two_sided", "mxfp4-g32"),
])  # fmt: skip
def test_our_own_layout_holds_every_format_and_family(tmp_path: Path, name: str, method: str, level: str) -> None:
    model, text = save(name, tmp_path / "m"), text_file(tmp_path)
    report = assay.compress(model, tmp_path / "out", level=level, method=method, engine="assay", calibration=text, **SMALL)
    assert report["ledger"]["done"] == report["ledger"]["planned"] > 0
    source, result = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    assert result.names == source.names
    assert {x.name for x in result.levels.values()} == {level}
    for tensor in source.names:
        found, meant = result.read(tensor), source.read(tensor)
        assert (found.shape, found.dtype) == (meant.shape, meant.dtype), tensor
        if tensor not in result.levels:
            assert torch.equal(found.view(torch.uint8), meant.view(torch.uint8)), f"{tensor} is not what it was"
        else:
            assert float((found.float() - meant.float()).square().mean()) < 0.1 * float(meant.float().square().mean()), tensor
    simulated = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assay.export(tmp_path / "out", "plain", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    ids = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded = assay.load(tmp_path / "out").float().eval()
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)
        assert not torch.allclose(loaded(ids).logits, simulated(ids).logits)


def test_a_result_that_was_not_read_back_is_written_again(tmp_path: Path, monkeypatch) -> None:
    model, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    with monkeypatch.context() as cut:
        cut.setattr("assay.handover.reopen.compare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            assay.compress(model, tmp_path / "out", bits=4.7, calibration=text, **SMALL)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"damaged")
    assay.compress(model, tmp_path / "out", bits=4.7, calibration=text, **SMALL)
    (tmp_path / "whole").mkdir()
    assay.compress(model, tmp_path / "whole" / "out", bits=4.7, calibration=text, **SMALL)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole" / "out")
    with pytest.raises(InputError, match="exists"):
        assay.compress(model, tmp_path / "out", bits=4.7, calibration=text, **SMALL)


def test_vllm_gets_one_level_for_what_it_fuses(tmp_path: Path) -> None:
    model = save("qwen3_moe", tmp_path / "m")
    assay.compress(model, tmp_path / "out", bits=8.0, engine="vllm", calibration=text_file(tmp_path), **SMALL)
    levels = Checkpoint.open(tmp_path / "out").levels
    for block in range(2):
        experts = {v.name for k, v in levels.items() if f"layers.{block}.mlp.experts" in k}
        attention = {v.name for k, v in levels.items() if f"layers.{block}.self_attn" in k and "o_proj" not in k}
        assert len(experts) <= 1 and len(attention) <= 1
    assert {v.bits for v in levels.values()} <= {4, 8}


@pytest.mark.parametrize("family_name", ["gpt2", "mixtral"])
def test_the_plain_engine_takes_conv1d_and_experts(family_name: str, tmp_path: Path) -> None:
    model = save(family_name, tmp_path / "m")
    report = assay.compress(model, tmp_path / "out", bits=4.7, engine="plain", calibration=text_file(tmp_path), **SMALL)
    assert report["ledger"]["done"] == report["ledger"]["planned"] > 0
    verdict = assay.verify(tmp_path / "out", model, text=text_file(tmp_path, "a dog, a fox.\n" * 100), window=32)
    assert 0 < verdict["kl"]["measured"] < 0.1


def test_a_run_killed_after_any_block_ends_with_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    model, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    for name in ("whole", *(f"cut{stop}" for stop in range(5))):
        (tmp_path / name).mkdir()
    assay.compress(model, tmp_path / "whole" / "out", bits=4.7, calibration=text, **SMALL)
    real, countdown = execution.save_tensors, [0]

    def cut(path, tensors, metadata=None) -> None:
        if countdown[0] == 0:
            raise KeyboardInterrupt
        countdown[0] -= 1
        real(path, tensors, metadata)

    for stop in range(5):
        out = tmp_path / f"cut{stop}" / "out"
        countdown[0] = stop
        monkeypatch.setattr(execution, "save_tensors", cut)
        with pytest.raises(KeyboardInterrupt):
            assay.compress(model, out, bits=4.7, calibration=text, **SMALL)
        assert not out.exists()
        monkeypatch.setattr(execution, "save_tensors", real)
        assay.compress(model, out, bits=4.7, calibration=text, **SMALL)
        assert digests(out) == digests(tmp_path / "whole" / "out")
        assert not out.with_name(".out.assay").exists()


def test_an_expert_that_saw_no_token_falls_back_and_says_so(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "m", num_local_experts=32, num_experts_per_tok=1)
    text = text_file(tmp_path, "aaaa" * 400)
    with pytest.raises(ShortfallError, match="fell back"):
        assay.compress(model, tmp_path / "out", bits=4.7, engine="plain", calibration=text, tokens=256, window=32)
    rows = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    assert any(r["fate"] == "fell_back" and "no calibration token" in r["reason"] for r in rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assay.profile("builtin", folder / "p", tokens=4096)
    return folder


@pytest.mark.parametrize("bits", [2.3, 3.0, 4.25, 6.0])
def test_budgets_are_bounds_and_mixed_plans_beat_uniform_ones(trained: Path, bits: float) -> None:
    plan = assay.plan(trained / "p", bits=bits)
    assert bits - 0.05 < plan.bits <= bits
    assert plan.predicted <= plan.uniform["predicted"]
    text = trained / "plan.yaml"
    plan.save(text)
    assert type(plan).load(text).to_text().count("\n") == plan.to_text().count("\n")


def test_a_size_is_the_bytes_of_the_weight_files(trained: Path) -> None:
    report = assay.compress("builtin", trained / "sized", size="4.2MB", profile=trained / "p")
    files = sum(p.stat().st_size for p in (trained / "sized").glob("*.safetensors"))
    assert files == report["bytes"] <= 4_200_000
    verdict = assay.verify(trained / "sized", "builtin", tokens=4096)
    assert verdict["bytes"] == files
    assert verdict["kl"]["low"] < verdict["kl"]["measured"] < verdict["kl"]["high"]


def test_two_bits_hurt_four_do_not_and_the_promise_holds(trained: Path) -> None:
    found = {}
    for bits in (2.3, 4.3):
        assay.compress("builtin", trained / f"b{bits}", bits=bits, profile=trained / "p")
        found[bits] = assay.verify(trained / f"b{bits}", "builtin", tokens=8192)
    assert found[4.3]["kl"]["measured"] < 0.1 * found[2.3]["kl"]["measured"]
    assert found[4.3]["perplexity"]["compressed"] < 1.02 * found[4.3]["perplexity"]["original"]
    for bits, (low, high) in {2.3: (0.65, 1.5), 4.3: (0.7, 1.4)}.items():
        kl = found[bits]["kl"]
        assert low < kl["predicted"] / kl["measured"] < high


def test_export_to_plain_decodes_the_same_weights(trained: Path) -> None:
    assay.compress("builtin", trained / "packed", bits=4.3, profile=trained / "p", method="gptq")
    assay.export(trained / "packed", "plain", trained / "plain")
    packed, plain = Checkpoint.open(trained / "packed"), Checkpoint.open(trained / "plain")
    for name in packed.levels:
        assert torch.equal(packed.read(name), plain.read(name))
    assert "quantization_config" not in plain.config


@pytest.mark.skipif(not PEBBLE.exists(), reason="../shared/models/pebble is absent")
def test_each_solver_is_better_than_the_simpler_one(tmp_path: Path) -> None:
    text = PEBBLE.parents[1] / "data" / "wikitext2"
    assay.profile(PEBBLE, tmp_path / "p", calibration=text / "valid.txt", tokens=16384)
    measured = {}
    for method in ("nearest", "gptq", "two_sided"):
        assay.compress(PEBBLE, tmp_path / method, bits=3.32, method=method, uniform=True, profile=tmp_path / "p")
        measured[method] = assay.verify(tmp_path / method, PEBBLE, text=text / "test.txt", tokens=7680)["kl"]["measured"]
    assert measured["gptq"] < 0.55 * measured["nearest"]
    assert measured["two_sided"] < 0.85 * measured["gptq"]
