"""Tunes what is left in floating point, scales, low-rank terms and norms, of the whole rounded model at once.

Rounding treats one matrix at a time, so errors that could cancel across matrices remain. Here all scales and all
vectors that stay (norms, biases) are multiplied by 1 + d, d times their root mean square is added to the factors of
low-rank terms, and d follows the gradient of the KL divergence from the
original's predictions, on the text that the profile was made from. After the first pass over that text a share of
its tokens is drawn anew in each pass from what the original predicts there: new text of the same kind, without which
the few tokens of a calibration are learned by heart. Text held out of it decides which of the states on the way is
used, and whether any is. (Distillation into quantized weights: LLM-QAT, 2023; of scales and norms
only: Norm Tweaking, 2023.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from assay.execute import Results
from assay.measure.precision import stored_precision
from assay.measure.profile import Profile
from assay.measure.stream import LOGITS_AT_ONCE, StreamedModel
from assay.measure.text import recall
from assay.model import memory
from assay.model.errors import InputError
from assay.model.files import load_tensors, open_tensors, read_note, save_note, save_tensors
from assay.model.packed import Packed, TunablePacked
from assay.model.progress import Progress
from assay.model.sites import Site

BATCH_TOKENS = 2048
CACHED_BYTES = 1 << 28
BYTES_PER_WEIGHT = 24
"""In memory at once: original, decoded and tunable forms and gradients in float32, and what decoding needs on its way."""
CHECK_EVERY = 8
PASSES = 24
RATE = 3e-3
RESAMPLED = 0.3
"""Measured on pebble, 16,384 tokens, 96 steps at 3 bits in groups: 0.889 of the KL on other text, 0.934 without."""
BETAS = (0.9, 0.98)
WARM_UP = 10


class Polished(Results):
    """Results with tuned scales and factors, and the plain tensors that were tuned with them."""

    def __init__(self, base: Results, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        self.files, self.solved, self._home = base.files, base.solved, base._home
        self._numbers = {n: t for n, t in tensors.items() if n in base.solved}
        self.plain = {n: t for n, t in tensors.items() if n not in base.solved}
        self.sequential = base.sequential
        self.polish = report

    def packed(self, site: str) -> Packed:
        """One compressed weight."""
        found = super().packed(site)
        return _tunable(found).with_numbers(self._numbers[site].float()) if site in self._numbers else found


def check(model: StreamedModel, minutes: float) -> None:
    """Refuse a polish that can't be done. Raises InputError."""
    if not 0 < minutes < math.inf:
        raise InputError(f"--polish {minutes:g}: give a number of minutes above zero, or leave it out")
    weights = sum(torch.Size(model.checkpoint.shape(name)).numel() for name in model.checkpoint.names)
    need, free = BYTES_PER_WEIGHT * weights, memory.available()
    if need > free:
        wanted = f"--polish holds the whole model, about {need / 1e9:,.1f} GB, where {free / 1e9:,.1f} GB of memory are free"
        raise InputError(f"{wanted}; leave it out or use a larger machine")


def polish(model: StreamedModel, results: Results, profile: Profile, minutes: float, folder: Path, progress: Progress) -> Results:
    """Tune the results for about so many minutes; the same results where that doesn't help on held-out text.

    How many steps fit in the time is measured once and written into `folder`, so that a call that was cut off ends with
    the same result. `polish` of the returned results says what came of it: KL in nats per token before and after, on
    the held-out windows of the profile. Raises InputError when the text of the profile is no longer there.
    """
    target = folder / "polished.safetensors"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = recall(model.checkpoint, profile.index["calibration"], model.vocabulary, "--polish").ids
        with model.whole(), stored_precision(model.checkpoint):
            tuning = Tuning(model, results)
            tensors, report = _tune(tuning, text, torch.tensor(profile.index["held_out"]), minutes, folder, progress)
        save_tensors(target, tensors or {"empty": torch.zeros(1)}, _noted(report))
    report = _notes(target)
    before, after = report["before"], report["after"]
    if not report["used"]:
        progress.log(f"polish: {before:.4f} nats/token on held-out text, and not better after {report['steps']} steps; dropped")
        return Polished(results, {}, report)
    progress.log(f"polish: {before:.4f} nats/token on held-out text, {after:.4f} after {report['best']} steps")
    return Polished(results, load_tensors(target), report)


@dataclass(frozen=True)
class Knob:
    """Numbers that are tuned: those of a site or plain tensor `name`, in the parameter `path` of the running model.

    start: float32; unit: the size of its changes; decode: from such numbers to the parameter; dtype: in which both are stored.
    """

    name: str
    path: str
    start: Tensor
    unit: Tensor
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype


class Tuning:
    """A rounded model as a function of one vector d: every knob is its start plus its part of d in its units."""

    def __init__(self, model: StreamedModel, results: Results) -> None:
        self.model = model
        self.knobs: list[Knob] = []
        self.fixed: dict[str, Tensor] = {}
        sites: dict[str, list[Site]] = {}
        for site in model.anatomy.sites.values():
            sites.setdefault(site.parameter, []).append(site)
        for path, stored in model.anatomy.parameters.items():
            own = sites.get(path, [])
            if len(own) == len(stored) == 1 and stored[0] in results.solved:
                self._add_site(own[0], results)
            elif any(site.name in results.solved for site in own):
                self.fixed[path] = model.value(path, results.decoded)
            elif not own and len(stored) == 1:
                self._add_plain(path, stored[0])

    @property
    def size(self) -> int:
        """Length of d."""
        return sum(knob.start.numel() for knob in self.knobs)

    def numbers(self, d: Tensor) -> list[Tensor]:
        """The knobs' numbers, float32, at d [size]."""
        parts = d.split([knob.start.numel() for knob in self.knobs])
        return [k.start + k.unit * part.view_as(k.start) for k, part in zip(self.knobs, parts, strict=True)]

    def weights(self, d: Tensor) -> dict[str, Tensor]:
        """The tuned parameters at d, before any rounding; differentiable."""
        return {k.path: k.decode(x) for k, x in zip(self.knobs, self.numbers(d), strict=True)}

    def stored(self, d: Tensor) -> dict[str, Tensor]:
        """The knobs' numbers at d in their stored dtypes, by name."""
        return {k.name: x.to(k.dtype) for k, x in zip(self.knobs, self.numbers(d), strict=True)}

    def rounded(self, d: Tensor) -> dict[str, Tensor]:
        """The tuned parameters as a reader of the stored numbers decodes them."""
        pairs = zip(self.knobs, self.stored(d).values(), strict=True)
        return {k.path: k.decode(x.float()).to(k.dtype).float() for k, x in pairs}

    def log_p(self, ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log-probabilities [b, t, v] of ids [b, t]; of the original where there are no weights."""
        changed = {**self.fixed, **weights} if weights is not None else {}
        logits: Tensor = functional_call(self.model.model, changed, kwargs={"input_ids": ids}).logits
        return logits.float().log_softmax(-1)

    def _add_site(self, site: Site, results: Results) -> None:
        packed = results.packed(site.name)
        found = packed.tunable() if isinstance(packed, TunablePacked) else None
        if found is None:
            self.fixed[site.parameter] = self.model.value(site.parameter, results.decoded)
            return
        turned = (lambda x: found.decode(x).mT) if site.transposed else found.decode
        dtype = found.dtype or results.solved[site.name].scale_dtype
        self.knobs.append(Knob(site.name, site.parameter, found.numbers, found.unit, turned, dtype))

    def _add_plain(self, path: str, name: str) -> None:
        checkpoint = self.model.checkpoint
        dtype = checkpoint.dtype(name)
        trained = path in dict(self.model.model.named_parameters())
        if trained and len(checkpoint.shape(name)) == 1 and dtype.is_floating_point and checkpoint.parts(name) == [name]:
            start = self.model.value(path)
            self.knobs.append(Knob(name, path, start, start, lambda x: x, dtype))


class Text:
    """Windows in pieces whose logits fit in memory, with what the original predicts for them."""

    def __init__(self, tuning: Tuning, ids: Tensor, cached: bool) -> None:
        self._tuning = tuning
        size = max(1, LOGITS_AT_ONCE // (ids.shape[1] * tuning.model.vocabulary))
        self.pieces = list(ids.split(size))
        with torch.no_grad():
            self._cache = [tuning.log_p(piece).half() for piece in self.pieces] if cached else None
        self.batch = max(1, BATCH_TOKENS // (size * ids.shape[1]))
        self.batches = -(-len(self.pieces) // self.batch)

    @torch.no_grad()
    def seen(self, piece: int, turn: int) -> tuple[Tensor, Tensor]:
        """Ids [b, t] of a piece and the original's log-probabilities [b, t, v] for them; drawn anew in each turn but 0."""
        ids = self.pieces[piece]
        log_p = self._tuning.log_p(ids) if self._cache is None else self._cache[piece].float().log_softmax(-1)
        if turn == 0:
            return ids, log_p
        drawn = _resampled(ids, log_p, torch.Generator().manual_seed(turn * 1_000_003 + piece))
        return drawn, self._tuning.log_p(drawn)

    def kl(self, piece: int, weights: Mapping[str, Tensor], turn: int = 0) -> Tensor:
        """KL in nats from the original to the model with these weights, summed over the predicted tokens of a piece."""
        ids, p = self.seen(piece, turn)
        return (p.exp() * (p - self._tuning.log_p(ids, weights)))[:, :-1].sum()

    @torch.no_grad()
    def mean_kl(self, weights: Mapping[str, Tensor]) -> float:
        """KL in nats per token over all pieces."""
        total = sum(float(self.kl(i, weights)) for i in range(len(self.pieces)))
        return total / sum(p.numel() - len(p) for p in self.pieces)

    def gradient(self, step: int, d: Tensor) -> Tensor:
        """Gradient with respect to d [size] of the mean KL of the batch that is due at a step."""
        leaf = d.detach().requires_grad_()
        weights = self._tuning.weights(leaf)
        ends = {path: weight.detach().requires_grad_() for path, weight in weights.items()}
        turn, batch = divmod(step, self.batches)
        places = range(batch * self.batch, min((batch + 1) * self.batch, len(self.pieces)))
        count = sum(self.pieces[i].numel() - len(self.pieces[i]) for i in places)
        for i in places:
            (self.kl(i, ends, turn) / count).backward()
        reached = [path for path, end in ends.items() if end.grad is not None]
        torch.autograd.backward([weights[path] for path in reached], [ends[path].grad for path in reached])
        assert leaf.grad is not None
        return leaf.grad


def _resampled(ids: Tensor, log_p: Tensor, generator: torch.Generator) -> Tensor:
    """Ids [b, t], a share of which is drawn from log-probabilities [b, t, v] that the token before gives them."""
    sums = log_p[:, :-1].exp().cumsum(-1)
    draws = torch.rand(*sums.shape[:2], 1, generator=generator) * sums[..., -1:]
    drawn = torch.searchsorted(sums, draws)[..., 0].clamp(max=log_p.shape[-1] - 1)
    picked = torch.rand(drawn.shape, generator=generator) < RESAMPLED
    return torch.cat([ids[:, :1], torch.where(picked, drawn, ids[:, 1:])], 1)


def _noted(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as the metadata of a file, so that they are durable together with its tensors."""
    return {"facts": json.dumps(facts)}


def _notes(path: Path) -> dict[str, Any]:
    with open_tensors(path) as file:
        return dict(json.loads(file.metadata["facts"]))


def _tunable(packed: Packed) -> TunablePacked:
    assert isinstance(packed, TunablePacked)
    return packed


def _tune(
    tuning: Tuning, ids: Tensor, held_out: Tensor, minutes: float, folder: Path, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best numbers met on the way, in their stored dtypes (none where nothing was better), and the report."""
    cached = 2 * (ids.numel() + held_out.numel()) * tuning.model.vocabulary <= CACHED_BYTES
    text, judge = Text(tuning, ids, cached), Text(tuning, held_out, cached)
    steps = _steps(tuning, text, judge, minutes, folder)
    state = _State.open(folder, tuning, judge)
    with progress.task("polishing the whole model", steps) as advance:
        advance(state.step)
        while state.step < steps:
            state.advance(text.gradient(state.step, state.d), RATE * _pace(state.step, steps))
            if state.step % CHECK_EVERY == 0 or state.step == steps:
                state.judge(judge.mean_kl(tuning.rounded(state.d)))
                state.save(folder)
            advance()
    report = {
        "minutes": minutes, "steps": steps, "best": state.best_step, "before": state.before, "after": state.best_kl,
        "used": state.best_step > 0, "tuned": tuning.size,
    }  # fmt: skip
    return tuning.stored(state.best) if state.best_step else {}, report


def _pace(step: int, steps: int) -> float:
    """Share of the full rate: a short rise, then a straight fall to zero."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)


def _steps(tuning: Tuning, text: Text, judge: Text, minutes: float, folder: Path) -> int:
    """How many steps fit in the time, at most `PASSES` over the text; measured by the first call on a folder. 0 of nothing."""
    path = folder / "steps.json"
    if tuning.size == 0:
        return 0
    if not path.exists():
        start = torch.zeros(tuning.size)
        text.gradient(0, start)
        begin = perf_counter()
        text.gradient(text.batches, start)
        middle = perf_counter()
        judge.mean_kl(tuning.rounded(start))
        seconds = (middle - begin) + (perf_counter() - middle) / CHECK_EVERY
        save_note(path, {"steps": max(1, min(int(60 * minutes / seconds), PASSES * text.batches))})
    return int(read_note(path, "damaged")["steps"])


class _State:
    """Where the search is: d, Adam's moments of its gradient, and the best d met so far."""

    def __init__(self, vectors: Mapping[str, Tensor], step: int, best_step: int, before: float, best_kl: float) -> None:
        self.d, self.first, self.second, self.best = (vectors[n] for n in _VECTORS)
        self.step, self.best_step, self.before, self.best_kl = step, best_step, before, best_kl

    @classmethod
    def open(cls, folder: Path, tuning: Tuning, judge: Text) -> _State:
        """Where an earlier call stopped, or the start."""
        path = folder / "state.safetensors"
        if path.exists():
            return cls(load_tensors(path), **_notes(path))
        vectors = {name: torch.zeros(tuning.size) for name in _VECTORS}
        before = judge.mean_kl(tuning.rounded(vectors["d"]))
        return cls(vectors, 0, 0, before, before)

    def save(self, folder: Path) -> None:
        """Write durably."""
        vectors = (self.d, self.first, self.second, self.best)
        facts = {"step": self.step, "best_step": self.best_step, "before": self.before, "best_kl": self.best_kl}
        save_tensors(folder / "state.safetensors", dict(zip(_VECTORS, vectors, strict=True)), _noted(facts))

    def advance(self, gradient: Tensor, rate: float) -> None:
        """One step of Adam (A Method for Stochastic Optimization, 2014)."""
        self.step += 1
        self.first = torch.lerp(gradient, self.first, BETAS[0])
        self.second = torch.lerp(gradient.square(), self.second, BETAS[1])
        mean, square = self.first / (1 - BETAS[0] ** self.step), self.second / (1 - BETAS[1] ** self.step)
        self.d = self.d - rate * mean / (square.sqrt() + 1e-8)

    def judge(self, kl: float) -> None:
        """Note the KL of d on held-out text."""
        if kl < self.best_kl:
            self.best, self.best_step, self.best_kl = self.d.clone(), self.step, kl


_VECTORS = ("d", "first", "second", "best")
