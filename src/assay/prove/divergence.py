"""Perplexity, KL divergence and agreement of candidates with a reference, streamed through both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from assay.measure.stream import Activations, Override, StreamedModel, batches, micro, token_divergences, token_losses
from assay.measure.text import Windows
from assay.model.progress import Progress

RESAMPLES = 1000


@dataclass(frozen=True)
class Candidate:
    """A model to compare: its own checkpoint, or the reference's with weights changed on the fly."""

    model: StreamedModel
    override: Override | None = None


@dataclass
class Scores:
    """Per predicted token of one candidate, one row a window: [windows, length - 1] each.

    kl: nats, from the reference to the candidate; loss and reference_loss: nats; agrees: same top token; top: the candidate's.
    """

    kl: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    reference_loss: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    top: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, candidate: Tensor, ids: Tensor) -> None:
        """Logits [b, t, v] of both for ids [b, t]."""
        self.kl.append(token_divergences(reference, candidate))
        self.loss.append(token_losses(candidate, ids))
        self.reference_loss.append(token_losses(reference, ids))
        self.top.append(candidate[:, :-1].argmax(-1).int())
        self.agrees.append((reference[:, :-1].argmax(-1) == self.top[-1]).float())

    def summary(self) -> dict[str, dict[str, float] | float]:
        """Means with 95% bootstrap intervals over windows, and the KL's median and 99th percentile."""
        kl, loss, base, agrees = (torch.cat(x).double() for x in (self.kl, self.loss, self.reference_loss, self.agrees))
        low, high = interval(kl.mean(1))
        loss_low, loss_high = interval(loss.mean(1) - base.mean(1))
        same_low, same_high = interval(agrees.mean(1))
        return {
            "kl": {
                "measured": float(kl.mean()), "low": low, "high": high,
                "median": float(kl.flatten().quantile(0.5)), "p99": float(_quantile(kl.flatten(), 0.99)),
            },
            "perplexity": {
                "original": float(base.mean().exp()), "compressed": float(loss.mean().exp()),
                "loss_difference_low": loss_low, "loss_difference_high": loss_high,
            },
            "agreement": float(agrees.mean()), "agreement_low": same_low, "agreement_high": same_high,
        }  # fmt: skip


def _quantile(values: Tensor, q: float) -> Tensor:
    return values.kthvalue(max(1, min(len(values), round(q * len(values)))))[0]


def interval(per_window: Tensor, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean of [windows] values, resampling whole windows."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(per_window), (RESAMPLES, len(per_window)), generator=generator)
    means = per_window[picks].mean(1).sort()[0]
    return float(means[int(0.025 * RESAMPLES)]), float(means[int(0.975 * RESAMPLES) - 1])


@torch.no_grad()
def compare(
    reference: StreamedModel, candidates: Mapping[str, Candidate], windows: Windows, progress: Progress
) -> dict[str, Scores]:
    """Run the windows through the reference and every candidate, one block in memory at a time."""
    runs = {"": Candidate(reference)} | dict(candidates)
    models = {id(run.model): run.model for run in runs.values()}
    parts = batches(windows.ids, reference.batch_tokens)
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        work = Activations(Path(folder))
        for model in models.values():
            model.forget()
        for model in models.values():
            with model.outside(tail=False):
                for b, ids in enumerate(parts):
                    hidden = model.embed(ids)
                    for name, run in runs.items():
                        if run.model is model:
                            work.put(name, b, hidden)
        with progress.task("comparing, block by block", len(reference.blocks)) as advance:
            for index in range(len(reference.blocks)):
                for name, run in runs.items():
                    with run.model.block(index, run.override):
                        for b in range(len(parts)):
                            work.put(name, b, run.model.run_block(index, work.get(name, b), b))
                advance()
        return {name: _score(reference, run.model, name, parts, work) for name, run in candidates.items()}


def _score(reference: StreamedModel, model: StreamedModel, name: str, parts: list[Tensor], work: Activations) -> Scores:
    scores = Scores()
    with reference.outside(tail=True):
        if model is reference:
            _add(scores, reference, model, name, parts, work)
        else:
            with model.outside(tail=True):
                _add(scores, reference, model, name, parts, work)
    return scores


def _add(
    scores: Scores, reference: StreamedModel, model: StreamedModel, name: str, parts: list[Tensor], work: Activations
) -> None:
    for b, ids in enumerate(parts):
        pieces = [micro(work.get(run, b), reference.vocabulary) for run in ("", name)]
        start = 0
        for ours, theirs in zip(*pieces, strict=True):
            scores.add(reference.logits(ours), model.logits(theirs), ids[start : start + len(ours)])
            start += len(ours)
