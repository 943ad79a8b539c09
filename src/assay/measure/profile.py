"""The profile: what was measured of a model, on disk, enough to plan without the model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.measure import tokens
from assay.measure.capture import Capture, Enough, OnProduct
from assay.measure.curvatures import EMPTY, LARGEST, Curvatures, block_name
from assay.measure.index import check
from assay.measure.precision import stored_precision
from assay.measure.stream import BATCH_TOKENS, Activations, StreamedModel, batches, micro, token_losses
from assay.measure.sums import PARTS, LargestCached, Sums, gather
from assay.measure.text import Windows
from assay.measure.weightwise import WeightSums
from assay.model.errors import InputError
from assay.model.files import load_tensors, read_note, save_note, save_tensors
from assay.model.progress import SWEEPS, Progress
from assay.model.sites import Site

VERSION = 6
WEIGHTWISE = ("gradient", "fisher")
INDEX = "profile.json"
THINNED, ENOUGH = 4, 64
"""G on every fourth window, or on 64 of more than 256, leaves prices and predictions as good: see RESULTS.md (Speed)."""
ENOUGH_TO_SOLVE = 256
"""G on so many windows rounds nearly as well as on more: see RESULTS.md (Speed)."""


class Gradients(NamedTuple):
    """How much of G is measured: on every so-many-th window, which stand for all; whole: with what is off its diagonal."""

    every: int = 1
    whole: bool = True


ALL_GRADIENTS = Gradients()


@dataclass(frozen=True)
class Profile:
    """A folder of statistics and its index. `index` is what profile.json holds."""

    folder: Path
    index: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Profile:
        """Open a finished profile. Raises InputError."""
        path = Path(folder)
        index = read_note(path / INDEX, "not a profile, or one that was cut off; run assay profile again")
        if index.get("version") != VERSION:
            raise InputError(f"{path}: profile version {index.get('version')}, this assay reads {VERSION}; measure again")
        check(index, str(path / INDEX))
        return cls(path, index)

    @property
    def prices(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """Damage in nats per token by site, level and method."""
        return self.index["prices"]

    @cached_property
    def nbytes(self) -> int:
        """Size of the profile on disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    @cached_property
    def digest(self) -> str:
        """Of all that its index says, so that nothing made by one profile is taken for another's."""
        return hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest()

    def curvatures(self, block: int | None, weightwise: Sequence[str] = ()) -> Curvatures:
        """Statistics of every site of one block, or of those outside the blocks, by site name."""
        shapes = {row["name"]: tuple(row["shape"]) for row in self.index["rows"]}
        return Curvatures(self.folder, block, int(self.index["calibration"]["tokens"]), weightwise, shapes)


def measure(
    model: StreamedModel, windows: Windows, folder: Path, seed: int, progress: Progress,
    weightwise: Sequence[str] = (), token_weights: str = "none", gradients: Gradients = ALL_GRADIENTS,
) -> None:  # fmt: skip
    """Two sweeps over the model: inputs (H) forwards, output gradients (G) backwards.

    weightwise: further statistics with a number for every weight of the blocks: "fisher", the mean over tokens of
    squared gradients, labels sampled from the model as for G; "gradient", of the mean loss on the text itself.
    token_weights: how much the tokens count in the H of the blocks, see `tokens`.
    Every finished block is durable, and a second call continues where the first was cut off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = Activations(folder / "activations")
    if (folder / "outside.G.safetensors").exists():
        shutil.rmtree(work.folder)
        return
    tokens = work.batch_tokens(model.batch_tokens)
    text = Batches.of(windows.ids, tokens, gradients.every, model.share(windows.tokens // gradients.every, tokens))
    with stored_precision(model.checkpoint):
        _sweep(model, text, folder, work, seed, progress, weightwise, token_weights, gradients.whole)
    (folder / "head.partial.safetensors").unlink()
    shutil.rmtree(work.folder)


def thinned(windows: int) -> int:
    """`Gradients.every` where only prices need G: `THINNED`, but two windows or more for each part of the text, or `ENOUGH`."""
    return max(1, min(THINNED, windows // (2 * PARTS)), windows // ENOUGH)


@dataclass(frozen=True)
class Batches:
    """A text in batches of windows, and the windows of it that gradients are taken on in batches of their own.

    whole, some: ids [windows, length] of each batch; picked: which windows are in each of `some`; places: the part of
    the text, of `PARTS` or fewer, that each window is in. What a block is called with is noted for `whole`, then for `some`.
    """

    whole: list[Tensor]
    some: list[Tensor]
    picked: list[Tensor]
    places: Tensor

    @classmethod
    def of(cls, ids: Tensor, tokens: int, every: int, fewer: int) -> Batches:
        """Batches of so many tokens; of `every`-th window, where that isn't all, of `fewer`."""
        places = torch.arange(len(ids)) * min(PARTS, len(ids)) // len(ids)
        picked = torch.arange(0, len(ids), every)
        each = max(1, (tokens if every == 1 else fewer) // ids.shape[1])
        return cls(batches(ids, tokens), list(ids[picked].split(each)), list(picked.split(each)), places)

    @property
    def all_picked(self) -> bool:
        return self.windows == sum(map(len, self.picked))

    @property
    def windows(self) -> int:
        return len(self.places)

    @property
    def share(self) -> float:
        """Of all windows, those in `some`."""
        return sum(map(len, self.picked)) / self.windows

    def note(self, b: int) -> int:
        """Number of the noted call of batch `b` of `some`."""
        return b if self.all_picked else len(self.whole) + b

    def keep(self, work: Activations, index: int, b: int, hidden: Tensor) -> None:
        """Write what batch `b` of `whole` is before block `index`, and its windows that are in `some` apart if not all are."""
        work.put(f"h{index}", b, hidden)
        if not self.all_picked and len(mine := self._picked_of(b)):
            work.put(f"p{index}", b, hidden[mine % len(self.whole[0])])

    def states(self, work: Activations, index: int, b: int) -> Tensor:
        """Hidden states of batch `b` of `some` before block `index`."""
        if self.all_picked:
            return work.get(f"h{index}", b)
        homes = (self.picked[b] // len(self.whole[0])).unique().tolist()
        return torch.cat([work.get(f"p{index}", w)[torch.isin(self._picked_of(w), self.picked[b])] for w in homes])

    def _picked_of(self, b: int) -> Tensor:
        """Numbers of the windows of batch `b` of `whole` that are in `some`."""
        picked = torch.cat(self.picked)
        return picked[picked // len(self.whole[0]) == b]

    def to_all(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over `some` raised to what they would be over `whole`; magnitudes stay."""
        return {k: v if k.startswith(LARGEST) else self.raised(v) for k, v in values.items()}

    def raised(self, total: Tensor) -> Tensor:
        """A sum over `some` raised to what it would be over `whole`."""
        return total if self.all_picked else total / self.share


def _sweep(
    model: StreamedModel, text: Batches, folder: Path, work: Activations, seed: int, progress: Progress,
    weightwise: Sequence[str], token_weights: str, whole: bool,
) -> None:  # fmt: skip
    with progress.task(SWEEPS[0], len(model.blocks) + 1) as advance:
        _forward(model, text, folder, work, advance, token_weights)
    with progress.task(SWEEPS[1], len(model.blocks) + 1) as advance:
        _tail(model, text, folder, work, seed, weightwise)
        advance()
        _backward(model, text, folder, work, advance, weightwise, whole)


def _forward(model: StreamedModel, text: Batches, folder: Path, work: Activations, advance: Any, token_weights: str) -> None:
    model.forget()
    with model.outside(tail=False):
        for b, ids in enumerate(text.whole):
            text.keep(work, 0, b, model.embed(ids))
        for ids in () if text.all_picked else text.some:
            model.embed(ids)
    advance()
    for index in range(len(model.blocks)):
        target = folder / f"{block_name(index)}.H.safetensors"
        if not target.exists():
            save_tensors(target, _forward_block(model, text, work, index, token_weights))
            if not text.all_picked:
                work.drop(f"h{index}")
        advance()


def _forward_block(model: StreamedModel, text: Batches, work: Activations, index: int, token_weights: str) -> dict[str, Tensor]:
    sums, places = Sums(), text.places.split([len(ids) for ids in text.whole])

    def run(b: int, sums: Sums) -> None:
        hidden = work.get(f"h{index}", b)
        sums.places, sums.length = places[b], text.whole[b].shape[1]
        sums.weights = tokens.weights(token_weights, model, index, hidden, b)
        hidden = model.run_block(index, hidden, b, LargestCached(sums.values), sums.inputs)
        text.keep(work, index + 1, b, hidden)

    with torch.no_grad(), model.block(index):
        gather(run, len(text.whole), (sums,), model.small)
    sums.untouched(model.anatomy.block_sites(index))
    return sums.finished()


def _tail(model: StreamedModel, text: Batches, folder: Path, work: Activations, seed: int, weightwise: Sequence[str]) -> None:
    """Gradients of the sampled-label loss at the last block's output, and the head's statistics."""
    depth = len(model.blocks)
    target = folder / "head.partial.safetensors"
    if target.exists():
        return
    if "gradient" in weightwise:
        _text_tail(model, text.some, work)
    head = [s for s in model.anatomy.sites.values() if s.role == "head"]
    inputs, outputs = Sums(), Sums()

    def run(b: int, inputs: Sums, outputs: Sums) -> None:
        draws = _draws(seed, b * len(text.some[0]), *text.some[b].shape)
        gradients: list[Tensor] = []
        for hidden in micro(text.states(work, depth, b), model.vocabulary):
            hidden.requires_grad_(True)
            with Capture(model.model, "", head if text.all_picked else (), inputs.inputs):
                logits = model.logits(hidden).flatten(0, 1)
            p = logits.detach().softmax(-1)
            labels, draws = _sampled(p, draws[: len(p)]), draws[len(p) :]
            for site in head:
                outputs.plus(f"{site.name}|{site.reads}", (p - p.square()).sum(0))
            p[torch.arange(len(p)), labels] -= 1  # now the gradient of the cross-entropy
            logits.backward(p)
            gradients.append(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)
        work.put(f"g{depth}", b, torch.cat(gradients))

    with model.outside(tail=True):
        gather(run, len(text.some), (inputs, outputs), model.few_logits(text.some[0].shape[1]))
        if head and not text.all_picked:
            _head_inputs(model, head, (work.get(f"h{depth}", b) for b in range(len(text.whole))), inputs)
    save_tensors(target, inputs.finished() | text.to_all(outputs.values) or {EMPTY: torch.zeros(1)})


def _head_inputs(model: StreamedModel, head: list[Site], states: Iterable[Tensor], sums: Sums) -> None:
    """The head's H, of the last block's outputs [windows, length, hidden]. Call inside `outside()`."""

    def add(sites: list[Site], x: Tensor, y: Tensor) -> None:
        sums.inputs(sites, x, y)
        raise Enough

    for hidden in states:
        with torch.no_grad(), suppress(Enough), Capture(model.model, "", head, add, early=True):
            model.logits(hidden)


def _text_tail(model: StreamedModel, parts: list[Tensor], work: Activations) -> None:
    """Gradients of the loss on the text at the last block's output."""
    depth = len(model.blocks)
    with model.outside(tail=True):
        for b, ids in enumerate(parts):
            hidden = work.get(f"h{depth}", b)
            pieces = micro(hidden, model.vocabulary)
            gradients = []
            for piece, labels in zip(pieces, ids.split([len(p) for p in pieces]), strict=True):
                piece.requires_grad_(True)
                token_losses(model.logits(piece), labels).sum().backward()
                gradients.append(piece.grad if piece.grad is not None else torch.zeros_like(piece))
            work.put(f"t{depth}", b, torch.cat(gradients))


def _draws(seed: int, first: int, windows: int, length: int) -> Tensor:
    """Uniform numbers [tokens, 1] of so many windows from number `first` on; those of a window don't depend on the batch."""
    size = max(1, BATCH_TOKENS // length)
    groups = range(first // size, (first + windows - 1) // size + 1)
    seeds = (torch.Generator().manual_seed(seed * 1_000_003 + group) for group in groups)
    return torch.cat([torch.rand(size * length, 1, generator=g) for g in seeds])[first % size * length :][: windows * length]


def _sampled(p: Tensor, draws: Tensor) -> Tensor:
    """One label per row of probabilities [tokens, vocabulary], by inversion of draws [tokens, 1] (twenty times multinomial)."""
    sums = p.cumsum(-1)
    return torch.searchsorted(sums, draws * sums[:, -1:])[:, 0].clamp(max=p.shape[1] - 1)


def _backward(
    model: StreamedModel, text: Batches, folder: Path, work: Activations, advance: Any, weightwise: Sequence[str], whole: bool
) -> None:
    total, windows = sum(p.numel() for p in text.some), text.windows
    counts = {"fisher": total, "gradient": total - windows}
    for index in reversed(range(len(model.blocks))):
        target = folder / f"{block_name(index)}.G.safetensors"
        if not target.exists():
            sums, more = Sums(whole), {kind: WeightSums() for kind in weightwise}
            sites = model.anatomy.block_sites(index)

            def run(b: int, sums: Sums, *others: WeightSums, index: int = index) -> None:
                more = dict(zip(weightwise, others, strict=True))
                flows: dict[str, list[OnProduct]] = {"g": [sums.gradients]}
                if "fisher" in more:
                    flows["g"].append(more["fisher"].fisher)
                if "gradient" in more:
                    flows["t"] = [more["gradient"].gradient]
                sums.places, sums.length = text.places[text.picked[b]], text.some[b].shape[1]
                for flow, watchers in flows.items():
                    _descend(model, index, b, text, work, flow, watchers)

            with model.block(index):
                gather(run, len(text.some), (sums, *more.values()), model.small)
            sums.unreached(sites)
            for kind, found in more.items():
                found.untouched(sites)
                save_tensors(folder / f"{block_name(index)}.{kind}.safetensors", found.averages(counts[kind]))
            save_tensors(target, text.to_all(sums.finished()))
        for flow in ("h", "p", "g", "t"):
            work.drop(f"{flow}{index + 1}")
        advance()
    _outside(model, text, folder, work)


def _descend(
    model: StreamedModel, index: int, b: int, text: Batches, work: Activations, flow: str, watchers: Sequence[OnProduct]
) -> None:
    """One batch's gradients through a loaded block: from its output to its input."""

    def watch(sites: list[Site], x: Tensor, y: Tensor) -> None:
        for watcher in watchers:
            watcher(sites, x, y)

    hidden = text.states(work, index, b).requires_grad_(True)
    out = model.run_block(index, hidden, text.note(b), watch=watch)
    out.backward(work.get(f"{flow}{index + 1}", b))
    work.put(f"{flow}{index}", b, hidden.grad if hidden.grad is not None else torch.zeros_like(hidden))


def _outside(model: StreamedModel, text: Batches, folder: Path, work: Activations) -> None:
    """Statistics of the embedding (token counts and the gradient at its output) and of the head."""
    head = load_tensors(folder / "head.partial.safetensors")
    forward = {k: v for k, v in head.items() if "|" not in k or k.startswith("n|")}
    backward = {k: v for k, v in head.items() if k not in forward}
    embedding = next((s for s in model.anatomy.sites.values() if s.role == "embedding"), None)
    if embedding is not None:
        counts = torch.bincount(torch.cat(text.whole).flatten(), minlength=embedding.shape[0]).float()
        total = sum(p.numel() for p in text.whole)
        sums = Sums()
        for b in range(len(text.some)):
            sums.add(embedding.reads, work.get("g0", b))
        forward[embedding.reads] = text.raised(sums.finished()[embedding.reads])
        forward[f"n|{embedding.reads}"] = torch.tensor(float(total))
        backward[f"{embedding.name}|{embedding.reads}"] = (counts + 0.5) * (total / (total + 0.5 * len(counts)))
    save_tensors(folder / "outside.H.safetensors", forward or {EMPTY: torch.zeros(1)})
    save_tensors(folder / "outside.G.safetensors", backward or {EMPTY: torch.zeros(1)})


def save_index(folder: Path, index: Mapping[str, Any]) -> Profile:
    """Close a profile: written last, so that a folder with an index is complete."""
    save_note(folder / INDEX, {"version": VERSION} | dict(index))
    return Profile.open(folder)
