"""Perplexity, KL divergence and agreement of candidates with a reference, streamed through both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from assay.measure.stream import Activations, Override, StreamedModel, batches, micro
from assay.measure.text import Windows
from assay.model.progress import COMPARING, Progress
from assay.model.threads import in_turn

RESAMPLES = 1000


@dataclass(frozen=True)
class Candidate:
    """A model to compare: its own checkpoint, or the reference's with weights changed on the fly."""

    model: StreamedModel
    override: Override | None = None


class Predictions:
    """What logits [b, t, v] for ids [b, t] say of each token to come, made when it is asked for.

    log_p, p: [b, t - 1, v]; loss: nats, and top: the likeliest token, [b, t - 1].
    """

    def __init__(self, logits: Tensor, ids: Tensor) -> None:
        self.log_p, self._ids = logits[:, :-1].log_softmax(-1), ids

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @cached_property
    def loss(self) -> Tensor:
        return -self.log_p.gather(-1, self._ids[:, 1:, None])[..., 0]

    @cached_property
    def top(self) -> Tensor:
        return self.log_p.argmax(-1).int()


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

    def add(self, reference: Predictions, candidate: Predictions, kl_only: bool = False) -> None:
        """What both predict for the same tokens."""
        self.kl.append((reference.p * (reference.log_p - candidate.log_p)).sum(-1).clamp_min(0))
        if kl_only:
            return
        self.loss.append(candidate.loss)
        self.reference_loss.append(reference.loss)
        self.top.append(candidate.top)
        self.agrees.append((reference.top == candidate.top).float())

    def extend(self, more: Scores) -> None:
        """Scores of further windows."""
        for mine, theirs in zip(vars(self).values(), vars(more).values(), strict=True):
            mine.extend(theirs)

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
    reference: StreamedModel, candidates: Mapping[str, Candidate], windows: Windows, progress: Progress, kl_only: bool = False,
    kept: Path | None = None, batch_tokens: int | None = None,
) -> dict[str, Scores]:  # fmt: skip
    """Run the windows through the reference and every candidate, one block in memory at a time.

    kl_only: leave the other scores empty; kept: a folder where the reference's outputs stay for the next call with the same
    windows, which then need not run it; batch_tokens: how many go through a block at once, None: what suits the reference.
    """
    known = kept is not None and kept.exists()
    runs = dict(candidates) if known else {"": Candidate(reference)} | dict(candidates)
    models = {id(run.model): run.model for run in runs.values()}
    parts = batches(
        windows.ids, reference.share(windows.tokens, reference.batch_tokens) if batch_tokens is None else batch_tokens
    )
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
        with progress.task(COMPARING, len(reference.blocks)) as advance:
            for index in range(len(reference.blocks)):
                for name, run in runs.items():
                    _pass(run, index, name, len(parts), work)
                advance()
        originals = work if kept is None else Activations(kept)
        for b in range(0 if known or kept is None else len(parts)):
            originals.put("", b, work.get("", b))
        return _scores(reference, candidates, parts, originals, work, kl_only)


def _pass(run: Candidate, index: int, name: str, count: int, work: Activations) -> None:
    """Every batch through a block."""

    def one(b: int) -> None:
        work.put(name, b, run.model.run_block(index, work.get(name, b), b))

    with run.model.block(index, run.override):
        list(in_turn(one, range(count), run.model.small))


def _scores(
    reference: StreamedModel, candidates: Mapping[str, Candidate], parts: list[Tensor], originals: Activations, work: Activations,
    kl_only: bool,
) -> dict[str, Scores]:  # fmt: skip
    """By candidate; those of one model are scored together, beside predictions of the reference that are made once."""
    scores = {name: Scores() for name in candidates}
    for model in {id(run.model): run.model for run in candidates.values()}.values():
        names = [name for name, run in candidates.items() if run.model is model]

        def score(b: int, model: StreamedModel = model, names: list[str] = names) -> list[Scores]:
            found = [Scores() for _ in names]
            hidden = micro(originals.get("", b), reference.vocabulary)
            changed = [micro(work.get(name, b), reference.vocabulary) for name in names]
            for i, labels in enumerate(parts[b].split([len(piece) for piece in hidden])):
                meant = Predictions(reference.logits(hidden[i]), labels)
                for own, pieces in zip(found, changed, strict=True):
                    own.add(meant, Predictions(model.logits(pieces[i]), labels), kl_only)
            return found

        with reference.outside(tail=True), nullcontext() if model is reference else model.outside(tail=True):
            for found in in_turn(score, range(len(parts)), reference.few_logits(parts[0].shape[1])):
                for name, own in zip(names, found, strict=True):
                    scores[name].extend(own)
    return scores
