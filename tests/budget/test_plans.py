"""Plans of real profiles: their bytes are those of the files, and a plan from a file is checked before it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import build
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save, text_file

import assay
from assay.budget import plans
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.level import Level

SMALL = {"tokens": 1024, "window": 32}


def stacked(folder: Path) -> Path:
    """A mixtral whose files keep the experts as 3-D tensors, as transformers holds them."""
    save("mixtral", folder)
    state = build("mixtral")[1].state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def fp8(folder: Path, scale: float) -> Path:
    """A llama in bf16 whose matrices are FP8 codes with one scale each."""
    save("llama", folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            tensors |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), scale)}
        else:
            tensors[name] = weight.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fused", {"engine": "vllm", "bits": 7.0}),
        ("fused", {"engine": "transformers", "size": "150KB"}),
        ("stacked", {"engine": "plain", "bits": 28.5}),
        ("stacked", {"engine": "plain", "bits": 30.5, "keep": ("*.0.*",)}),
        ("fp8", {"engine": "transformers", "bits": 7.0, "keep": ("*.0.*q_proj",)}),
        ("fp8 in powers of two", {"engine": "transformers", "bits": 7.0, "keep": ("*.0.*q_proj",)}),
    ],
)
def test_the_bytes_of_a_plan_add_up_to_those_of_the_files(kind: str, options: dict, tmp_path: Path) -> None:
    make = {"fused": lambda f: save("qwen3", f), "stacked": stacked, "fp8": lambda f: fp8(f, 0.00037)}
    model = make.get(kind, lambda f: fp8(f, 2.0**-12))(tmp_path / "m")
    assay.profile(model, tmp_path / "p", calibration=text_file(tmp_path), **SMALL)
    plan = assay.plan(tmp_path / "p", **options)
    source = Checkpoint.open(model)
    sites = {r.name: r for r in plans.rows(StreamedModel(source), source.kept_nbytes)}
    for name, choice in plan.choices.items():
        row = sites[name]
        assert choice.nbytes == (Level.parse(choice.level).nbytes(*row.shape, 4) if choice.level else row.stored_bytes), name
    report = assay.compress(model, tmp_path / "out", plan=plan, profile=tmp_path / "p")
    written = Checkpoint.open(tmp_path / "out")
    stored = sum(info.nbytes for info in written.stored.values())
    ledger = json.loads((tmp_path / "out" / "assay" / "ledger.json").read_text())
    assert sum(row["bytes_after"] for row in ledger) == stored
    if options["engine"] == "plain":  # its files hold what the packed bytes decode to
        saved = sum(sites[n].stored_bytes - choice.nbytes for n, choice in plan.choices.items())
        assert plan.nbytes_tensors == source.weight_bytes - source.header_bytes - saved
    else:
        assert plan.nbytes_tensors == stored
    assert report["bits_all"] == 8 * plan.nbytes_tensors / sum(torch.Size(source.shape(n)).numel() for n in source.names)


@pytest.fixture(scope="module")
def stacked_model(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return StreamedModel(Checkpoint.open(stacked(tmp_path_factory.mktemp("stacked"))))


@given(st.integers(0, 10**6))
def test_the_sites_of_a_stacked_tensor_share_its_bytes_to_the_last(stacked_model: StreamedModel, nbytes: int) -> None:
    rows = [r for r in plans.rows(stacked_model, lambda name: nbytes) if r.stacked]
    tensors = {s.name for s in stacked_model.anatomy.sites.values() if s.stacked}
    assert sum(r.stored_bytes for r in rows) == nbytes * len(tensors)
