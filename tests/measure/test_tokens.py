"""Token weights change H as their definition says, and nothing else."""

from pathlib import Path

import pytest
import torch
from families import build
from measured import encode, pebble_block

from assay.measure import profile, tokens
from assay.measure.profile import Curvatures, measure
from assay.measure.stream import StreamedModel
from assay.measure.text import Windows
from assay.methods.solve.curvature import damage
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.progress import Silent

IDS = torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))


def measured(folder: Path, family: str, kind: str, name: str) -> Path:
    if not (folder / "m").exists():
        build(family)[1].float().eval().save_pretrained(folder / "m")
    streamed = StreamedModel(Checkpoint.open(folder / "m"))
    measure(streamed, Windows(IDS, "random"), folder / name, 0, Silent(), token_weights=kind)
    return folder / name


def h(folder: Path, block: int) -> dict[str, torch.Tensor]:
    return {name: c.h for name, c in Curvatures(folder, block, IDS.numel()).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "bloom"])
def test_attention_is_what_eager_attention_returns(tmp_path: Path, family: str) -> None:
    _, model = build(family)
    model.save_pretrained(tmp_path / "m")
    streamed = StreamedModel(Checkpoint.open(tmp_path / "m"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(IDS, output_attentions=True).attentions
    with streamed.outside(tail=False):
        hidden = streamed.embed(IDS)
    for index, attention in enumerate(maps):
        with torch.no_grad(), streamed.block(index), tokens.AttentionSums() as sums:
            hidden = streamed.run_block(index, hidden, 0)
        assert sums.received is not None
        torch.testing.assert_close(sums.received, attention.sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_equal_weights_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measured(tmp_path, "llama", "none", "plain")
    monkeypatch.setattr(tokens, "weights", lambda kind, model, index, hidden, b: torch.ones(hidden.shape[:2]))
    for path in plain.iterdir():
        assert path.read_bytes() == (measured(tmp_path, "llama", "attention", "ones") / path.name).read_bytes(), path.name


def test_no_weight_equals_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    found = measured(tmp_path, "llama", "chunk-4-9", "chunk")
    inputs: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(profile.Sums, "inputs", lambda self, sites, x, y: inputs.setdefault(sites[0].name, []).append(x.detach()))
    model = StreamedModel(Checkpoint.open(tmp_path / "m"))
    with model.outside(tail=False):
        hidden = model.embed(IDS)
    with torch.no_grad(), model.block(0) as block:
        sums = profile.Sums()
        with profile.Capture(block, model.anatomy.block_names[0], model.anatomy.block_sites(0), sums.inputs):
            model.run_block(0, hidden, 0)
    monkeypatch.undo()
    for name, (x,) in inputs.items():
        alone = x[:, 4:9].flatten(0, 1)
        torch.testing.assert_close(h(found, 0)[name], alone.T @ alone / len(alone), rtol=1e-4, atol=1e-5)
        sums = profile.Sums()
        sums.add("x", x, kept.float() * kept.numel() / kept.sum())
        torch.testing.assert_close(sums.values["x"] / kept.numel(), x[kept].T @ x[kept] / kept.sum(), rtol=1e-4, atol=1e-5)


def test_attention_weights_have_mean_one_and_keep_g(tmp_path: Path) -> None:
    plain, weighted = (measured(tmp_path, "llama", kind, kind) for kind in ("none", "attention"))
    received = torch.rand(5, 9, generator=torch.Generator().manual_seed(2)) * 7
    found = tokens.concentrated(received)
    torch.testing.assert_close(found.mean(1), torch.ones(5))
    torch.testing.assert_close(found.amin(1) / found.amax(1), torch.full((5,), tokens.FLOOR))
    assert torch.equal(found.argsort(1), received.argsort(1))
    torch.testing.assert_close(tokens.concentrated(torch.full((1, 4), 2.0)), torch.ones(1, 4))
    for block in (0, 1):
        one, other = h(plain, block), h(weighted, block)
        assert all(not torch.allclose(one[n], other[n], rtol=1e-3) for n in one)
        assert (plain / f"block-{block:04d}.G.safetensors").read_bytes() == (
            weighted / f"block-{block:04d}.G.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [("mamba", "attention", "shows no attention"), ("mixtral", "attention", "experts"),
     ("llama", "chunk-9-20", "inside the window"), ("llama", "last-4", "first-N or chunk-A-B"),
     ("llama", "first-0", "inside the window")],
)  # fmt: skip
def test_what_can_t_be_weighted_is_refused(tmp_path: Path, family: str, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        measured(tmp_path, family, kind, "p")
    assert "\n" not in str(caught.value)


def test_on_real_weights_each_h_is_won_by_its_own_solution() -> None:
    plain, weighted = pebble_block(), pebble_block(token_weights="attention")
    totals = torch.zeros(2, 2)
    for name, (weight, curvature) in plain.items():
        moments = (curvature.h, weighted[name][1].h)
        for solved, c in enumerate((curvature, weighted[name][1])):
            difference = encode("gptq", "int3-g64-asym", weight, c).decode().float() - weight
            for judged, h in enumerate(moments):
                totals[solved, judged] += damage(difference, h)
    assert totals[1, 1] < totals[0, 1] and totals[0, 0] < totals[1, 0]
