"""The original model and one that is being changed, run side by side over the same text, block by block.

What a matrix of the changed model reads carries the errors of all that was changed before it. The second moment of
those inputs, and how they differ from the original's, let a solver make up for errors that lie behind it (H of the
quantized model: GPTQ, 2022; the difference: GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
Calibration, 2025). In memory are one block and the activations of one batch; the rest lies in files.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from assay.measure import tokens
from assay.measure.capture import Enough
from assay.measure.precision import stored_precision
from assay.measure.stream import Activations, Override, StreamedModel, batches
from assay.model.files import save_text
from assay.model.sites import Site


@dataclass(frozen=True)
class Met:
    """What the readers of one input meet, as means over tokens, float32 [in, in].

    h: E[y y^T] of the changed model's input y; cross: E[(x - y) y^T], with x the original's.
    """

    h: Tensor
    cross: Tensor


class Pair:
    """Both models' hidden states at the block that is due, in `folder`.

    First `pass_by` what lies outside the blocks; then for each block `original`, `met` for what is of interest in it,
    and `pass_by`. A new `Pair` in the same folder continues after the last block that was passed, with the same numbers.
    """

    def __init__(self, model: StreamedModel, ids: Tensor, folder: Path, token_weights: str = "none") -> None:
        """ids: the text, int64 [windows, length]; token_weights: as the profile's, see `tokens`."""
        self.model, self._work, self._kind = model, Activations(folder), token_weights
        self._parts = batches(ids, self._work.batch_tokens(model.batch_tokens))
        self._ran = -1
        self._places: dict[str, int] = {}
        self._weights: list[Tensor | None] = []

    def pass_by(self, index: int | None, changed: Override) -> None:
        """Bring both models past a block, all of whose sites are known now, or into the first (index None).

        changed: what the sites became, of the embedding too.
        """
        if index is None:
            self._enter(changed)
        elif not self._mark(index + 1).exists():
            self._leave(index, changed)

    @torch.no_grad()
    def original(self, index: int) -> list[str]:
        """Run the original's block; the keys of what its sites read (`Site.reads`), in the order in which it is used.

        Inputs of experts are left out: the two models may send other tokens to them.
        """
        self._ran, self._places, self._weights = index, {}, []
        with self._precise(), self.model.block(index):
            for b in range(len(self._parts)):
                hidden = self._work.get(f"original{index}", b)
                self._weights.append(tokens.weights(self._kind, self.model, index, hidden, b))
                self._work.put(f"original{index + 1}", b, self._observed(index, hidden, b))
        return list(self._places)

    @torch.no_grad()
    def met(self, index: int, reads: str, changed: Override) -> Met:
        """What the readers of `reads` meet when the sites before them are `changed`. Call after `original`."""
        sums = [torch.zeros(()), torch.zeros(())]
        count = 0

        def add(sites: list[Site], y: Tensor, _: Tensor) -> None:
            nonlocal count
            if sites[0].reads != reads:
                return
            rows, weights = y.reshape(-1, y.shape[-1]), self._weights[b]
            weighted = rows if weights is None else rows * weights.reshape(-1, 1)
            before = self._work.get(f"x{self._places[reads]}", b)
            sums[0], sums[1] = sums[0] + rows.T @ weighted, sums[1] + (before - rows).T @ weighted
            count += len(rows)
            raise Enough

        with self._precise(), self.model.block(index, changed):
            for b in range(len(self._parts)):
                with suppress(Enough):
                    self.model.run_block(index, self._work.get(f"changed{index}", b), b, watch=add, early=True)
        return Met(sums[0] / count, sums[1] / count)

    def _enter(self, changed: Override) -> None:
        for name, override in (("changed", changed), ("original", None)):
            self.model.forget()
            with self._precise(), self.model.outside(tail=False, override=override):
                for b, ids in enumerate(self._parts):
                    hidden = self.model.embed(ids)
                    if not self._mark(1).exists():
                        self._work.put(f"{name}0", b, hidden)

    @torch.no_grad()
    def _leave(self, index: int, changed: Override) -> None:
        if self._ran != index:
            self.original(index)
        with self._precise(), self.model.block(index, changed):
            for b in range(len(self._parts)):
                hidden = self._work.get(f"changed{index}", b)
                self._work.put(f"changed{index + 1}", b, self.model.run_block(index, hidden, b))
        save_text(self._mark(index + 1), "")
        for name in (f"original{index}", f"changed{index}", *(f"x{place}" for place in self._places.values())):
            self._work.drop(name)

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._work.folder, ignore_errors=True)

    def _observed(self, index: int, hidden: Tensor, b: int) -> Tensor:
        seen: set[str] = set()

        def keep(sites: list[Site], x: Tensor, _: Tensor) -> None:
            site = sites[0]
            if site.expert is None and site.reads not in seen:
                seen.add(site.reads)
                place = self._places.setdefault(site.reads, len(self._places))
                self._work.put(f"x{place}", b, x.reshape(-1, x.shape[-1]))

        return self.model.run_block(index, hidden, b, watch=keep)

    def _precise(self) -> AbstractContextManager[None]:
        return stored_precision(self.model.checkpoint)

    def _mark(self, index: int) -> Path:
        """There once a block can be entered."""
        return self._work.folder / f"entered{index}"
