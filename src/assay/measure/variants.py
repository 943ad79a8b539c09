"""Many models that differ from one model in a single block each, run together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from assay.measure.stream import Activations, Override, StreamedModel
from assay.model.progress import Progress


@dataclass(frozen=True)
class Variant:
    """The original but for one block, which runs with other weights, or not at all where `override` is None."""

    block: int
    override: Override | None


class Outputs:
    """What the last block gives for each window: of the original, and of each variant by its place."""

    def __init__(self, work: Activations) -> None:
        self._work = work

    def original(self, window: int) -> Tensor:
        """[1, length, hidden], float32."""
        return self._work.get("", window)

    def variant(self, index: int, window: int) -> Tensor:
        """The same of a variant."""
        return self._work.get(str(index), window)


@contextmanager
def outputs(model: StreamedModel, ids: Tensor, variants: Sequence[Variant], progress: Progress) -> Iterator[Outputs]:
    """Run windows [n, length] through the original and every variant; a variant shares what comes before its block.

    Activations lie in temporary files while the context is open: (variants + 1) x tokens x hidden x 4 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="assay-") as folder:
        work = Activations(Path(folder))
        with torch.no_grad():
            _run(model, list(ids.split(1)), variants, work, progress)
        yield Outputs(work)


def _run(
    model: StreamedModel, parts: Sequence[Tensor], variants: Sequence[Variant], work: Activations, progress: Progress
) -> None:
    windows = range(len(parts))
    model.forget()
    with model.outside(tail=False):
        for w in windows:
            work.put("", w, model.embed(parts[w]))
    with progress.task("variants, block by block", len(model.blocks)) as advance:
        for index in range(len(model.blocks)):
            for i, variant in enumerate(variants):
                if variant.block == index and variant.override is None:
                    for w in windows:
                        work.put(str(i), w, work.get("", w))
                elif variant.block == index:
                    with model.block(index, variant.override):
                        for w in windows:
                            work.put(str(i), w, model.run_block(index, work.get("", w), w))
            earlier = [str(i) for i, variant in enumerate(variants) if variant.block < index]
            with model.block(index):
                for w in windows:
                    for name in (*earlier, ""):
                        work.put(name, w, model.run_block(index, work.get(name, w), w))
            advance()
