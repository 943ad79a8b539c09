"""Every matrix of every family is a site with the right shape, or stays for a stated reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.sites import Anatomy, Site, survey

BLOCKS = 2
PER_BLOCK = {
    "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma2": 7, "gemma3_text": 7, "phi3": 4, "gpt2": 4, "opt": 6,
    "gpt_neox": 4, "bloom": 4, "falcon": 4, "mixtral": 4 + 4 * 3, "qwen3_moe": 4 + 4 * 3, "mamba": 3, "bert": 6, "vit": 6,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Anatomy, nn.Module]:
    folder = tmp_path_factory.mktemp(request.param)
    _, model = build(request.param)
    model.save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    return checkpoint, survey(checkpoint), model


def expected_weight(model: nn.Module, site: Site) -> Tensor:
    """The matrix [out, in] that the running model multiplies with."""
    parameter = model.get_parameter(site.parameter).detach()
    if site.expert is not None:
        assert site.rows is not None
        return parameter[site.expert, site.rows[0] : site.rows[1]]
    return parameter.T if site.transposed else parameter


def test_every_stored_tensor_is_a_site_or_has_a_reason(opened) -> None:
    checkpoint, anatomy, _ = opened
    sites = {site.name for site in anatomy.sites.values()}
    assert sites | set(anatomy.kept) == set(checkpoint.names)
    assert not sites & set(anatomy.kept)
    assert all(reason and "\n" not in reason for reason in anatomy.kept.values())


def test_no_matrix_of_a_linear_layer_in_a_block_is_forgotten(opened) -> None:
    _, anatomy, model = opened
    assert len(anatomy.block_names) == BLOCKS
    for block in range(BLOCKS):
        assert len(anatomy.block_sites(block)) == PER_BLOCK[anatomy.family]
    assert [model.get_submodule(name) for name in anatomy.block_names]


def test_shapes_are_out_by_in_and_the_stored_numbers_are_the_running_ones(opened) -> None:
    checkpoint, anatomy, model = opened
    for site in anatomy.sites.values():
        stored = checkpoint.read(site.name)
        weight = stored.T if site.transposed else stored
        assert weight.shape == site.shape
        torch.testing.assert_close(weight, expected_weight(model, site), rtol=0, atol=0)


def test_running_the_module_multiplies_with_the_sites_weight(opened) -> None:
    checkpoint, anatomy, model = opened
    for site in anatomy.block_sites(0):
        if site.expert is not None:
            continue
        module = model.get_submodule(site.parameter.removesuffix(".weight"))
        stored = checkpoint.read(site.name)
        x = torch.randn(3, site.shape[1], generator=torch.Generator().manual_seed(5))
        bias = module.bias if module.bias is not None else 0
        expected = x @ (stored if site.transposed else stored.T) + bias
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_sites_that_share_an_input_agree_about_its_width(opened) -> None:
    _, anatomy, _ = opened
    widths: dict[str, set[int]] = {}
    for site in anatomy.sites.values():
        widths.setdefault(site.reads, set()).add(site.shape[1])
    assert all(len(found) == 1 for found in widths.values())


def test_q_k_and_v_of_llama_share_one_input(tmp_path: Path) -> None:
    _, model = build("llama")
    model.save_pretrained(tmp_path)
    block = survey(Checkpoint.open(tmp_path)).block_sites(0)
    groups: dict[str, set[str]] = {}
    for site in block:
        groups.setdefault(site.reads, set()).add(site.role)
    assert sorted(map(sorted, groups.values())) == [
        ["attn.k", "attn.q", "attn.v"], ["attn.o"], ["mlp.down"], ["mlp.gate", "mlp.up"],
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_a_second_matrix(tmp_path: Path, tied: bool) -> None:
    _, model = build("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    anatomy = survey(Checkpoint.open(tmp_path))
    outside = {site.role for site in anatomy.sites.values() if site.block is None}
    assert anatomy.tied is tied
    assert outside == (set() if tied else {"embedding", "head"})
    assert ("model.embed_tokens.weight" in anatomy.kept) is tied


def test_a_tensor_that_the_class_does_not_use_is_kept(tmp_path: Path) -> None:
    _, model = build("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"extra.table": torch.zeros(4, 4)}, file, {"format": "pt"})
    assert "not used" in survey(Checkpoint.open(tmp_path)).kept["extra.table"]


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nonesuch"}, "unknown architecture 'nonesuch'"),
        ({"model_type": None}, "model_type"),
        ({"intermediate_size": 128}, "don't belong together"),
        ({"vocab_size": 100}, "don't belong together"),
        ({"num_hidden_layers": 3}, "the files lack model.layers.2"),
    ],
)
def test_a_config_that_is_not_of_these_files_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    _, model = build("llama")
    model.save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as caught:
        survey(Checkpoint.open(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_never_run_and_the_message_names_no_option_that_does_not_exist(tmp_path: Path) -> None:
    _, model = build("llama")
    model.save_pretrained(tmp_path)
    change_config(tmp_path, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(InputError, match="own needs code from its folder, which assay never runs") as caught:
        survey(Checkpoint.open(tmp_path))
    assert "--" not in str(caught.value) and "\n" not in str(caught.value)
