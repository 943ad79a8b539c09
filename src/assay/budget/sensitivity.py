"""Rankings of weight matrices by a sensitivity, with error bars, and which of them to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.budget.probe import PROBED_BITS, probed_level
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.methods import base
from assay.methods.sensitivity._subject import Sensitivity, Subject
from assay.model.errors import InputError
from assay.model.progress import Progress
from assay.prove.divergence import interval

FOLDER = "sensitivity"
BITS = 3
KEPT = 0.05
"""Share of the weights in the blocks that the answer to "what do I keep" may hold."""
RESAMPLES = 400


@dataclass(frozen=True)
class Row:
    """One matrix. count: weights; score: the mean of its samples, [low, high] its 95% bootstrap interval, None where
    there is one sample; keep: whether it is among those to keep; again: in what share of resamples it is, too.
    """

    site: str
    block: int
    role: str
    count: int
    score: float
    low: float | None
    high: float | None
    keep: bool
    again: float | None


@dataclass(frozen=True)
class Ranking:
    """Matrices by falling need: the score by weight where it is a price, else the score.

    bits: width of the rounding that is judged; samples: over what the intervals are taken; share: of all scores
    that the kept ones hold, None for mere orders; patterns: what `--keep` takes for them.
    """

    name: str
    bits: int
    prices: bool
    samples: str
    seconds: float
    rows: tuple[Row, ...]
    share: float | None
    patterns: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self)


def names() -> list[str]:
    """Every sensitivity."""
    return base.names(FOLDER)


def rank(
    profile: Profile, name: str, model: StreamedModel | None, progress: Progress, bits: int = BITS, kept: float = KEPT,
    seed: int = 0,
) -> Ranking:  # fmt: skip
    """Rank the matrices in the blocks. Raises InputError for an unknown name or width, and a model that is missing or another.

    bits: 2, 3 or 4; kept: the share of the blocks' weights to keep.
    """
    if bits not in PROBED_BITS:
        raise InputError(f"--bits {bits}: profiles hold the prices of {', '.join(map(str, sorted(PROBED_BITS)))} bits; give one")
    if model is not None and model.checkpoint.fingerprint != profile.index["model"]:
        raise InputError(f"{profile.folder}: a profile of another model; give --model its own")
    started, method = perf_counter(), _load(name)
    if "model" in method.needs and model is None:
        raise InputError(f"{name} runs the model itself; give it with --model, or use kfac, which needs the profile only")
    scores = method.score(Subject(profile, lambda columns: probed_level(columns, bits), model, seed, progress))
    rows = [row for row in profile.index["rows"] if row["name"] in scores]
    samples = torch.stack([scores[row["name"]].double() for row in rows])
    counts = torch.tensor([row["shape"][0] * row["shape"][1] for row in rows], dtype=torch.float64)
    worth = samples / counts[:, None] if method.prices else samples
    keep, again = _answer(worth, counts, [row["block"] for row in rows] if method.whole_blocks else None, kept)
    found = []
    for i, row in enumerate(rows):
        low, high = interval(samples[i]) if samples.shape[1] > 1 else (None, None)
        mean, certain = float(samples[i].mean()), None if again is None else float(again[i])
        found.append(Row(row["name"], row["block"], row["role"], int(counts[i]), mean, low, high, bool(keep[i]), certain))
    total, chosen = float(samples.mean(1).sum()), float(samples.mean(1)[keep].sum())
    order = worth.mean(1).sort(descending=True, stable=True).indices.tolist()
    return Ranking(
        name, bits, method.prices, method.samples if samples.shape[1] > 1 else "", perf_counter() - started,
        tuple(found[i] for i in order), chosen / total if method.prices and total > 0 else None,
        tuple(patterns([row.site for row in found if row.keep], rows)),
    )  # fmt: skip


def _answer(worth: Tensor, counts: Tensor, blocks: Sequence[int] | None, share: float) -> tuple[Tensor, Tensor | None]:
    """Which matrices to keep, and in what share of bootstrap resamples they are kept again; None for one sample.

    worth: [n, samples]; blocks: of every matrix, where whole blocks are kept or not.
    """
    units = torch.tensor(blocks) if blocks else torch.arange(len(worth))
    _, place = units.unique(return_inverse=True)
    first = torch.stack([(place == u).nonzero()[0, 0] for u in range(int(place.max()) + 1)])
    sizes = torch.zeros(len(first), dtype=torch.float64).index_add(0, place, counts)
    keep, count = to_keep(worth[first].mean(1), sizes, share)[place], worth.shape[1]
    if count < 2:
        return keep, None
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    drawn = torch.nn.functional.one_hot(picks, count).sum(1).double() / count
    return keep, to_keep(drawn @ worth[first].T, sizes, share).double().mean(0)[place]


def to_keep(worth: Tensor, counts: Tensor, share: float) -> Tensor:
    """The worthiest units while they hold at most a share of all weights, and the first in any case.

    worth: [..., n]; counts: weights [n]; returns bool [..., n].
    """
    order = worth.sort(dim=-1, descending=True, stable=True).indices
    fits = counts[order].cumsum(-1) <= share * counts.sum()
    fits[..., 0] = True
    return torch.zeros_like(worth, dtype=torch.bool).scatter(-1, order, fits)


def patterns(chosen: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The shortest list for `--keep`: a pattern for a block that is chosen whole, and the names of the others."""
    found: list[str] = []
    for block in dict.fromkeys(row["block"] for row in rows if row["name"] in chosen):
        inside = [row["name"] for row in rows if row["block"] == block]
        picked = [name for name in inside if name in chosen]
        prefix = _common(inside)
        whole = picked == inside and len(inside) > 1 and not any(
            row["name"].startswith(prefix) for row in rows if row["block"] != block
        )  # fmt: skip
        found += [f"{prefix}*"] if whole else picked
    return found


def correlations(rankings: Sequence[Ranking]) -> dict[str, dict[str, float | None]]:
    """Spearman's correlation of the scores of every two rankings of the same matrices; None where one is constant."""
    scores = {r.name: np.array([row.score for row in sorted(r.rows, key=lambda row: row.site)]) for r in rankings}
    return {a: {b: _spearman(x, y) for b, y in scores.items()} for a, x in scores.items()}


def _load(name: str) -> Sensitivity:
    return base.load(name, FOLDER)()


def _spearman(x: Any, y: Any) -> float | None:
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return None
    from scipy.stats import spearmanr  # takes a third of a second to import, which few runs need

    return float(spearmanr(x, y).statistic)


def _common(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot."""
    first, last = min(names), max(names)
    end = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind(".", 0, end) + 1]
