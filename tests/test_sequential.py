"""Compressing in the order of the model: what is measured on the way, what it gains, and that it can be cut off."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny import save, text_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import assay
from assay import execute as execution
from assay.measure import pair as pairing
from assay.measure.pair import Pair
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.sites import Site

SMALL = {"tokens": 1024, "window": 32}
LAYERS = "model.layers.{}.".format


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "report.html")  # its title is the folder
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def coarse(site: Site, weight: Tensor) -> Tensor:
    """A change that every matrix feels."""
    step = weight.abs().mean()
    return (weight / step).round() * step


def read_by(model: torch.nn.Module, name: str, ids: Tensor) -> Tensor:
    """Inputs of one linear map [tokens, in]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, x, y: seen.append(x[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


def test_what_is_met_equals_what_two_whole_models_read(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "m")
    model = StreamedModel(Checkpoint.open(folder))
    ids = torch.randint(1, 40, (6, 16), generator=torch.Generator().manual_seed(0))
    original, changed = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    early = [s for s in model.anatomy.block_sites(1) if ".self_attn." in s.name]
    for site in (*model.anatomy.block_sites(0), *early):
        weight = changed.get_parameter(site.parameter)
        weight.data = coarse(site, weight.data)
    pair = Pair(model, ids, tmp_path / "pair")
    pair.pass_by(None, lambda site, weight: weight)
    pair.original(0)
    pair.pass_by(0, coarse)
    order = pair.original(1)
    readers = {reads: next(s for s in model.anatomy.block_sites(1) if s.reads == reads) for reads in order}
    assert [s.role for s in readers.values()] == ["attn.q", "attn.o", "mlp.gate", "mlp.down"]
    reads, site = order[2], readers[order[2]]
    found = pair.met(1, reads, lambda s, w: coarse(s, w) if s in early else w)
    x, y = (read_by(m, site.module, ids) for m in (original, changed))
    assert float((x - y).norm()) > 0.05 * float(x.norm())
    torch.testing.assert_close(found.h, y.mT @ y / len(y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross, (x - y).mT @ y / len(y), rtol=1e-4, atol=1e-5)


def test_two_equal_models_meet_what_the_profile_measured(tmp_path: Path) -> None:
    folder, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    profile = assay.profile(folder, tmp_path / "p", calibration=text, **SMALL)
    model = StreamedModel(Checkpoint.open(folder))
    ids = pairing_ids(model, profile)
    pair = Pair(model, ids, tmp_path / "pair")
    pair.pass_by(None, lambda site, weight: weight)
    for reads in pair.original(0):
        found = pair.met(0, reads, lambda site, weight: weight)
        site = next(s for s in model.anatomy.block_sites(0) if s.reads == reads)
        torch.testing.assert_close(found.h, profile.curvatures(0)[site.name].h, rtol=1e-4, atol=1e-6)
        assert not found.cross.any()


def pairing_ids(model: StreamedModel, profile: Profile) -> Tensor:
    return execution.recall(model.checkpoint, profile.index["calibration"], model.vocabulary, "a test").ids


def test_it_loses_less_than_solving_all_at_once(tmp_path: Path) -> None:
    """On average over three texts: at 2 bits a single one gives 0.80 to 1.02, by last bits."""
    measured = {False: 0.0, True: 0.0}
    for tokens in (4096, 4352, 6144):
        source = tmp_path / f"p{tokens}"
        assay.profile("builtin", source, tokens=tokens, methods=["gptq"])
        for sequential in measured:
            out = tmp_path / f"{tokens}-{sequential}"
            assay.compress("builtin", out, sequential=sequential, level="int2-g64-asym", method="gptq", profile=source)
            measured[sequential] += assay.verify(out, "builtin", tokens=2048)["kl"]["measured"]
            assert json.loads((out / "assay" / "recipe.json").read_text())["sequential"] is sequential
    assert measured[True] < 0.95 * measured[False]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "gemma2", "gpt_neox", "falcon", "mamba", "opt"])
def test_other_families_too(tmp_path: Path, family: str) -> None:
    model = save(family, tmp_path / "m")
    report = assay.compress(model, tmp_path / "out", bits=4.7, engine="plain", calibration=text_file(tmp_path),
                            sequential=True, **SMALL)  # fmt: skip
    assert report["ledger"]["done"] == report["ledger"]["planned"] > 0


def test_a_run_cut_off_anywhere_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    assay.profile(model, tmp_path / "p", calibration=text, **SMALL)
    given = {"level": "int3-g32-asym", "profile": tmp_path / "p", "sequential": True}
    assay.compress(model, tmp_path / "whole", **given)
    real_put, real_save = pairing.Activations.put, execution.save_tensors
    calls = [0]

    def limited(real, *args) -> None:
        calls[0] -= 1
        if calls[0] < 0:
            raise KeyboardInterrupt
        real(*args)

    stop, finished = 0, False
    while not finished:
        calls[0], stop = stop, stop + 3
        out = tmp_path / f"cut{stop}" / "whole"  # the report's title is the name of the folder
        out.parent.mkdir()
        monkeypatch.setattr(pairing.Activations, "put", lambda *args: limited(real_put, *args))
        monkeypatch.setattr(execution, "save_tensors", lambda *args: limited(real_save, *args))
        try:
            assay.compress(model, out, **given)
            finished = True
        except KeyboardInterrupt:
            monkeypatch.setattr(pairing.Activations, "put", real_put)
            monkeypatch.setattr(execution, "save_tensors", real_save)
            assay.compress(model, out, **given)
        assert digests(out) == digests(tmp_path / "whole")
    assert stop > 12


def test_without_the_profiles_text_it_says_so(tmp_path: Path) -> None:
    model, text = save("llama", tmp_path / "m"), text_file(tmp_path)
    assay.profile(model, tmp_path / "p", calibration=text, **SMALL)
    text.write_text("other words, many of them. " * 200)
    with pytest.raises(InputError, match="--sequential needs it"):
        assay.compress(model, tmp_path / "out", level="int3-g32-asym", profile=tmp_path / "p", sequential=True)
    assert not (tmp_path / "out").exists()
