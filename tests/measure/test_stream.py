"""The streamed model computes what transformers computes, and holds nothing between blocks."""

from pathlib import Path

import pytest
import torch
from families import CAUSAL, build

from assay.measure.stream import StreamedModel
from assay.model.checkpoint import Checkpoint
from assay.model.precision import bf16_products


@pytest.fixture(params=CAUSAL)
def pair(request, tmp_path: Path):
    _, model = build(request.param)
    model = model.float().eval()
    model.save_pretrained(tmp_path)
    return StreamedModel(Checkpoint.open(tmp_path)), model


def run(streamed: StreamedModel, ids: torch.Tensor, watch=None) -> torch.Tensor:
    with streamed.outside(tail=False):
        hidden = streamed.embed(ids)
    for index in range(len(streamed.blocks)):
        with torch.no_grad(), streamed.block(index):
            hidden = streamed.run_block(index, hidden, 0, watch=watch)
    with torch.no_grad(), streamed.outside(tail=True):
        return streamed.logits(hidden)


def test_logits_equal_the_whole_model(pair) -> None:
    streamed, model = pair
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(run(streamed, ids), expected, atol=1e-5, rtol=1e-5)
    assert all(p.is_meta for p in streamed.model.parameters()), "weights stayed in memory"


@pytest.mark.parametrize("rounded", [False, True])
def test_every_product_of_every_site_is_seen(pair, rounded: bool) -> None:
    streamed, _ = pair
    seen: dict[str, tuple[int, int]] = {}

    def watch(sites, x, y) -> None:
        rows = sum(s.shape[0] for s in sites)
        assert x.dtype == y.dtype == torch.float32
        for site in sites:
            seen[site.name] = (y.shape[-1] * site.shape[0] // rows, x.shape[-1])

    with bf16_products(rounded):
        run(streamed, torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(2)), watch)
    inside = {s.name: s for s in streamed.anatomy.sites.values() if s.block is not None}
    dense = {name for name, s in inside.items() if s.expert is None}
    assert dense <= set(seen)
    assert all(seen[name] == inside[name].shape for name in seen)


def test_an_override_reaches_the_forward_pass(pair) -> None:
    streamed, _ = pair
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(3))
    before = run(streamed, ids)
    streamed.override = lambda site, weight: torch.zeros_like(weight)
    assert not torch.allclose(before, run(streamed, ids))
    streamed.override = lambda site, weight: weight.clone()
    torch.testing.assert_close(before, run(streamed, ids))
