"""Contracts: what an engine refuses, and the page that says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import WRITTEN
from tiny import save

from assay import engines
from assay.budget import offers
from assay.budget.menu import together
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.layouts import gptq
from assay.model.level import Level

ROOT = Path(__file__).parents[2]
SHAPE = (64, 64)


@pytest.mark.parametrize("name", engines.NAMES)
def test_a_contract_has_its_file_s_name_and_a_layout(name: str) -> None:
    contract = engines.get(name)
    assert contract.name == name
    layouts = (
        "plain",
        "compressed-tensors",
        "compressed-tensors-w8a8",
        "compressed-tensors-w8a8-static",
        "gptq",
        "gptq-v2",
        "awq",
        "assay",
        "gguf",
    )
    assert contract.layout in layouts
    assert contract.refuses("attn.q", SHAPE, False, None) is None
    assert contract.refusal("llama", False) is None


def test_an_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean transformers"):
        engines.get("transfomers")
    with pytest.raises(InputError, match="there are assay, awq, gptq, gptq-v2, llama.cpp, llama.cpp-all, plain"):
        engines.get("xyz")


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_packed_layouts_refuse_what_their_readers_lose(name: str) -> None:
    contract = engines.get(name)
    assert "Conv1D" in str(contract.refuses("attn.q", SHAPE, True, None))
    assert "embedding" in str(contract.refuses("embedding", SHAPE, False, None))
    assert "fewer than 9" in str(contract.refuses("attn.k", (8, 64), False, None))
    assert contract.refuses("attn.k", (9, 64), False, None) is None
    assert (contract.refuses("mlp.up", SHAPE, False, 0) is None) is (name == "vllm")
    assert (contract.refusal("mixtral", True) is None) is (name == "vllm")
    assert (contract.refuses("head", SHAPE, False, None) is None) is (name == "transformers")
    assert not contract.takes(Level(4, 64), 96), "64 does not divide 96"
    assert contract.takes(Level(4, 32), 96)
    assert contract.takes(Level(3, 32), 96) is (name == "transformers")


def test_vllm_is_offered_only_what_fills_its_words() -> None:
    contract, zeros = engines.get("vllm"), Level(4, None, False)
    assert contract.takes(zeros, 64, rows=96)
    assert not contract.takes(zeros, 64, rows=100) and not contract.takes(zeros, 100, rows=64)
    assert contract.takes(Level(4, None, True), 64, rows=100) and contract.takes(Level(8, None, False), 100, rows=100)
    assert contract.takes(Level(8, None, True, "fp"), 99, rows=99), "no words"
    assert engines.get("transformers").takes(zeros, 100, rows=100)


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq-v2", "vllm", "vllm-w8a8"])
def test_what_vllm_joins_is_decided_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    routing = {"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    settings = WRITTEN["mixtral"] | latent | routing | {"num_key_value_heads": 4, "num_hidden_layers": 1}
    monkeypatch.setattr("families.WRITTEN", {"deepseek_v3": settings})
    model = StreamedModel(Checkpoint.open(save("deepseek_v3", tmp_path)))
    found = together(offers.rows(model, model.checkpoint.nbytes), engines.get(name).fused)
    groups = [{row.name.split(".")[-2] for row in group} for group in found]
    assert {"q_a_proj", "kv_a_proj_with_mqa"} in groups and {"gate_proj", "up_proj"} in groups
    assert {"q_b_proj"} in groups and {"kv_b_proj"} in groups
    joined = "model.layers.0.self_attn.fused_qkv_a_proj"
    assert all(re.match(gptq.pattern(f"model.layers.0.self_attn.{n}"), joined) for n in ("q_a_proj", "kv_a_proj_with_mqa"))


def test_the_page_names_every_limit_of_the_contracts() -> None:
    page = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")
    limits = page[page.index("## What an engine can't hold") :]
    for name in engines.NAMES:
        contract = engines.get(name)
        assert all(family in limits for family in contract.unreadable)
        assert all(kind in limits for formats in contract.preferred for kind in formats)
        assert contract.least_outputs == 1 or f"fewer than {contract.least_outputs} outputs" in limits
    first_wrong = re.search(r'"transformers>=[\d.]+,<([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert first_wrong and f"below {first_wrong[1]}" in limits


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vllm@0.8.5", r"vllm 0.8.5 does not read .* needs vllm 0.11"), ("vllm-w8a8@0.10", "needs vllm 0.11"),
        ("transformers@5.23", "needs transformers 5.17 to 5.22"), ("transformers@4.57.1", "5.17 to 5.22"),
        ("vllm@new", "write it like vllm@0.11"), ("awq@2", "takes no version"), ("vlm@0.11", "did you mean vllm"),
    ],
)  # fmt: skip
def test_a_version_that_can_not_read_the_files_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        engines.get(name)


@pytest.mark.parametrize("name", ["vllm@0.11", "vllm@0.12.1", "transformers@5.18", "transformers@5.22.3", "vllm-w8a8@1.0"])
def test_a_version_that_reads_the_files_is_taken(name: str) -> None:
    assert engines.get(name) is engines.get(name.partition("@")[0])
