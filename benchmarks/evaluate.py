"""Judges compressed models against their original: KL, perplexity, agreement. One judge for all.

python benchmarks/evaluate.py ORIGINAL CANDIDATE...
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _harness import JUDGE_TEXT, JUDGE_WINDOWS, WINDOW, table, token_windows
from torch import Tensor
from transformers import AutoModelForCausalLM

BATCH = 8
RESAMPLES = 10_000


@dataclass(frozen=True)
class Judgement:
    """Means over the predicted tokens of each window, float64 [windows].

    kl: nats per token, from the original to the candidate; loss, loss_original: nats per token;
    agreement: share of tokens where both rank the same one first.
    """

    kl: np.ndarray
    loss: np.ndarray
    loss_original: np.ndarray
    agreement: np.ndarray

    def summary(self) -> dict[str, float]:
        """The tables' figures; `kl_low` and `kl_high` bound 95% of bootstraps over windows."""
        low, high = np.quantile(self.kl[_resamples(len(self.kl))].mean(1), [0.025, 0.975])
        return {
            "kl": float(self.kl.mean()),
            "kl_low": float(low),
            "kl_high": float(high),
            "perplexity": float(np.exp(self.loss.mean())),
            "perplexity_original": float(np.exp(self.loss_original.mean())),
            "agreement": float(self.agreement.mean()),
        }


class Judge:
    """Holds the original's log-probabilities on disk, for as many candidates as there are.

    ids: int64 [windows, length]. Every model runs in float32, one batch at a time.
    """

    def __init__(self, original: Path, ids: Tensor) -> None:
        self.ids = ids
        self._folder = tempfile.TemporaryDirectory(prefix="judge-")
        batches = _log_probabilities(original, ids)
        first = next(batches)
        shape = (len(ids), *first.shape[1:])
        file = Path(self._folder.name) / "original.f32"
        self.reference = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        self.reference[: len(first)] = first
        for index, batch in enumerate(batches, start=1):
            self.reference[index * BATCH : index * BATCH + len(batch)] = batch

    def judge(self, candidate: Path) -> Judgement:
        """Measure one candidate."""
        rows: list[tuple[Tensor, ...]] = []
        for index, log_q in enumerate(_log_probabilities(candidate, self.ids)):
            span = slice(index * BATCH, index * BATCH + len(log_q))
            log_p = torch.from_numpy(np.array(self.reference[span]))
            rows.append(_compare(log_p, log_q, self.ids[span]))
        return Judgement(*(torch.cat(part).numpy() for part in zip(*rows, strict=True)))


def evaluate(original: Path, candidate: Path, ids: Tensor) -> dict[str, float]:
    """Judge one candidate; use `Judge` for several. See `Judgement.summary`."""
    return Judge(original, ids).judge(candidate).summary()


def ratio(ours: Judgement, theirs: Judgement) -> tuple[float, float, float]:
    """KL of ours by theirs, and its 95% interval: both are resampled with the same windows."""
    picks = _resamples(len(ours.kl))
    spread = ours.kl[picks].mean(1) / theirs.kl[picks].mean(1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return float(ours.kl.mean() / theirs.kl.mean()), float(low), float(high)


def _resamples(windows: int) -> np.ndarray:
    """Bootstrap choices of windows, int64 [resamples, windows], the same in every run."""
    return np.random.default_rng(0).integers(windows, size=(RESAMPLES, windows))


@torch.no_grad()
def _log_probabilities(folder: Path, ids: Tensor) -> Iterator[Tensor]:
    """Batches of log-probabilities of the next token, float32 [windows, length - 1, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for batch in ids.split(BATCH):
        yield model(batch, use_cache=False).logits[:, :-1].log_softmax(-1)


def _compare(log_p: Tensor, log_q: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The four figures of a `Judgement` for one batch."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    losses = [-log.gather(-1, ids[:, 1:, None])[..., 0] for log in (log_q, log_p)]
    agrees = log_p.argmax(-1) == log_q.argmax(-1)
    return tuple(figure.double().mean(1) for figure in (kl, *losses, agrees))


def main() -> None:
    """Judge the candidates on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, default=JUDGE_TEXT)
    parser.add_argument("--windows", type=int, default=JUDGE_WINDOWS)
    parser.add_argument("--length", type=int, default=WINDOW, help="tokens in a window")
    given = parser.parse_args()
    ids = token_windows(given.original, given.text, given.windows, given.length)
    judge = Judge(given.original, ids)
    found = {folder: judge.judge(folder).summary() for folder in given.candidates}
    header = list(next(iter(found.values())))
    rows = [[folder, *(f"{value:.5f}" for value in row.values())] for folder, row in found.items()]
    print(table(["candidate", *header], rows))


if __name__ == "__main__":
    main()
