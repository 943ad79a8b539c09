"""Importance matrices: both forms read back, and a profile's holds the mean squares of the inputs."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import real_gguf as real
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import text_file

import assay
from assay.engines.gguf import imatrix
from assay.engines.gguf.imatrix import Imatrix, Importance
from assay.exporting import importance
from assay.measure.profile import Profile
from assay.model.errors import InputError


def made(seed: int, experts: int = 1) -> Imatrix:
    generator = torch.Generator().manual_seed(seed)
    names = ("blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight")
    entries = {
        name: Importance(torch.rand(experts, 32 + 32 * i, generator=generator), torch.full((experts,), 640.0))
        for i, name in enumerate(names)
    }
    return Imatrix(entries, "a text.txt", 20, 32)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), experts=st.integers(1, 3))
def test_a_gguf_matrix_reads_back(tmp_path_factory: pytest.TempPathFactory, seed: int, experts: int) -> None:
    path, matrix = tmp_path_factory.mktemp("x") / "imatrix.gguf", made(seed, experts)
    imatrix.write(path, matrix)
    found = imatrix.read(path)
    assert (found.text, found.windows, found.window) == ("a text.txt", 20, 32)
    assert found.entries.keys() == matrix.entries.keys()
    for name, entry in matrix.entries.items():
        torch.testing.assert_close(found.entries[name].mean, entry.mean)
        assert torch.equal(found.entries[name].tokens, entry.tokens)


def test_the_older_form_is_as_llama_cpp_writes_it(tmp_path: Path) -> None:
    matrix = made(0)
    imatrix.write(tmp_path / "imatrix.dat", matrix)
    raw = (tmp_path / "imatrix.dat").read_bytes()
    name = b"blk.0.attn_q.weight"
    assert raw[: 8 + len(name)] == struct.pack("<ii", 3, len(name)) + name
    calls, size = struct.unpack_from("<ii", raw, 8 + len(name))
    assert (calls, size) == (20, 32)
    values = np.frombuffer(raw, "<f4", size, 16 + len(name)) / calls
    np.testing.assert_allclose(values, matrix.entries[name.decode()].mean[0].numpy(), rtol=1e-6)
    found = imatrix.read(tmp_path / "imatrix.dat")
    assert (found.text, found.windows) == ("a text.txt", 20)
    for key, entry in matrix.entries.items():
        torch.testing.assert_close(found.entries[key].mean, entry.mean)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_profile_exports_what_its_inputs_were(tmp_path: Path, family: str) -> None:
    made = real.lively(family, tmp_path / "m", num_hidden_layers=1)
    text = text_file(tmp_path)
    assay.profile(tmp_path / "m", tmp_path / "p", calibration=text, tokens=1024, window=32, methods=("nearest",))
    assay.export(tmp_path / "p", "imatrix", tmp_path / "imatrix.gguf")
    found = imatrix.read(tmp_path / "imatrix.gguf").entries
    profile = Profile.open(tmp_path / "p")
    assert found.keys() == importance(profile).entries.keys()
    assert {"blk.0.attn_q.weight", "blk.0.attn_output.weight", "output.weight"} <= found.keys()
    seen: list[torch.Tensor] = []
    made.model.lm_head.register_forward_hook(lambda module, x, y: seen.append(x[0].detach()))
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "m")(text.read_text())["input_ids"]
    count = int(profile.index["calibration"]["tokens"])
    with torch.no_grad():
        made.model(torch.tensor(ids[:count]).view(-1, 32))
    wanted = torch.cat(seen).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(found["output.weight"].mean[0], wanted, rtol=1e-3, atol=1e-6)
    if family == "mixtral":
        stacked = found["blk.0.ffn_down_exps.weight"]
        assert stacked.mean.shape == (4, 96)
        # each token meets two experts
        assert stacked.tokens.sum() == 2 * count
    shapes = {t.name: tuple(t.shape) for t in GGUFReader(tmp_path / "imatrix.gguf").tensors}
    experts = 4 if family == "mixtral" else 1
    name = "ffn_gate_exps" if family == "mixtral" else "ffn_gate"
    assert shapes[f"blk.0.{name}.weight.in_sum2"] == (64, experts)
    assert shapes[f"blk.0.{name}.weight.counts"] == (1, experts)


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    imatrix.write(tmp_path / "a.dat", made(0))
    raw = (tmp_path / "a.dat").read_bytes()
    (tmp_path / "cut.dat").write_bytes(raw[:60])
    (tmp_path / "text.dat").write_bytes(b"no matrix at all, but a text that is long enough")
    imatrix.write(tmp_path / "a.gguf", made(0))
    (tmp_path / "other.gguf").write_bytes((tmp_path / "a.gguf").read_bytes().replace(b"imatrix", b"iMatrix"))
    for name in ("cut.dat", "text.dat", "other.gguf"):
        with pytest.raises(InputError, match="not an importance matrix"):
            imatrix.read(tmp_path / name)
    with pytest.raises(InputError, match="no importance matrix at"):
        imatrix.read(tmp_path / "absent.dat")
