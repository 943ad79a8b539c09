"""The loss without logits is the loss with them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

import assay.measure.cut_cross_entropy as cut
from assay.measure.cut_cross_entropy import cut_cross_entropy


def problem(words: int = 300, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator, dtype=dtype)
    classifier = torch.randn(words, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, words, (3, 11), generator=generator)
    targets[0, :4] = -100
    return hidden, classifier, torch.randn(words, generator=generator, dtype=dtype), targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients_are_exact(
    monkeypatch: pytest.MonkeyPatch, reduction: str, softcap: float | None, biased: bool
) -> None:
    monkeypatch.setattr(cut, "TILE", 64 * 29)
    hidden, classifier, bias, targets = problem()
    leaves = [hidden, classifier, bias] if biased else [hidden, classifier]
    results = []
    for ours in (True, False):
        given = [x.clone().requires_grad_() for x in leaves]
        shift = given[2] if biased else None
        if ours:
            loss = cut_cross_entropy(given[0], given[1], targets, bias=shift, softcap=softcap, reduction=reduction, epsilon=0)
        else:
            logits = given[0] @ given[1].T + (0 if shift is None else shift)
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
            loss = loss.view_as(targets) if reduction == "none" else loss
        (loss * torch.arange(loss.numel()).view_as(loss).add(1)).sum().backward()
        results.append([loss.detach(), *(g.grad for g in given)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_the_shift_is_that_of_a_language_model() -> None:
    hidden, classifier, _, targets = problem()
    wanted = functional.cross_entropy((hidden @ classifier.T)[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(cut_cross_entropy(hidden, classifier, targets, shift=True), wanted)


def test_filtering_skips_tiles_and_errs_less_than_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peaked distribution, as a trained model's: most words have no probability."""
    monkeypatch.setattr(cut, "TILE", 64 * 33)
    hidden, classifier, _, targets = problem(2048, torch.float32)
    with torch.no_grad():
        classifier[256:] *= 0.1
        hidden *= 6
        targets = (hidden @ classifier.T).argmax(-1)
    gradients = []
    for epsilon in (0.0, None):
        given = hidden.bfloat16().requires_grad_(), classifier.bfloat16().requires_grad_()
        cut_cross_entropy(*given, targets, epsilon=epsilon).backward()
        gradients.append(given[1].grad.float())
    assert (gradients[1] == 0).all(1).sum() > 1024
    exact = classifier.requires_grad_()
    cut_cross_entropy(hidden, exact, targets, epsilon=0).backward()
    assert (gradients[1] - gradients[0]).norm() < 0.1 * (gradients[0] - exact.grad).norm()


@pytest.mark.skipif(sys.platform == "darwin", reason="ru_maxrss has another unit there")
def test_peak_memory_does_not_grow_with_the_vocabulary() -> None:
    script = (
        "import torch, resource; from assay.measure.cut_cross_entropy import cut_cross_entropy as f;"
        "V={}; h=torch.randn(4096,8,requires_grad=True); c=torch.randn(V,8,requires_grad=True);"
        "t=torch.randint(0,V,(4096,)); f(h[:8],c,t[:8]).backward();"
        "a=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; f(h,c,t).backward();"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-a)"
    )
    grown = [int(subprocess.check_output([sys.executable, "-c", script.format(v)])) for v in (8192, 32768)]
    logits = 4096 * 32768 * 4 // 1024
    assert grown[1] < grown[0] + logits // 8
