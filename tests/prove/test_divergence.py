"""Divergence equals its definition on the whole model, and is zero for the model itself."""

from pathlib import Path

import pytest
import torch
from families import build

from assay.measure.stream import StreamedModel
from assay.measure.text import Windows
from assay.model.checkpoint import Checkpoint
from assay.model.progress import Silent
from assay.prove.divergence import Candidate, compare, interval


@pytest.fixture
def models(tmp_path: Path):
    _, model = build("llama")
    model.float().eval().save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (10, 16), generator=torch.Generator().manual_seed(0))
    return StreamedModel(Checkpoint.open(tmp_path)), model, Windows(ids, "random")


def test_the_model_itself_has_no_divergence(models) -> None:
    streamed, _, text = models
    found = compare(streamed, {"same": Candidate(streamed)}, text, Silent())["same"].summary()
    assert found["kl"]["measured"] < 1e-9
    assert found["agreement"] == 1.0


def test_divergence_equals_the_definition(models) -> None:
    streamed, model, text = models
    scores = compare(streamed, {"half": Candidate(streamed, lambda s, w: w * 0.5)}, text, Silent())["half"]
    with torch.no_grad():
        p = model(text.ids).logits[:, :-1].log_softmax(-1)
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.mul_(0.5)
        q = model(text.ids).logits[:, :-1].log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(torch.cat(scores.kl), expected, rtol=1e-3, atol=1e-6)
    loss = -q.gather(-1, text.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.cat(scores.loss), loss, rtol=1e-4, atol=1e-5)
    assert scores.summary()["perplexity"]["compressed"] == pytest.approx(float(loss.mean().exp()), rel=1e-4)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        low, high = interval(torch.randn(60, generator=generator).double())
        covered += low <= 0 <= high
    assert 176 <= covered <= 199
