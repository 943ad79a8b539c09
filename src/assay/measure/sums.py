"""What is summed over tokens while a model is profiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from assay.measure.curvatures import LARGEST, PART
from assay.measure.damage import diagonal
from assay.measure.triangle import mirror, strips
from assay.model.errors import InputError
from assay.model.sites import Site
from assay.model.threads import in_turn, threads_for

PARTS = 8
"""Parts of the text of which the diagonals of H and G are kept as well, so that their spread is known."""


class Sums:
    """Sums over tokens, float32: second moments by key, and the tokens they cover.

    weights: [windows, tokens], of mean 1, how much the inputs of the present batch count; None: all alike.
    places: part of the text that each window of the present batch, of `length` tokens, is in; of parts sums of squares are
    kept too. Where a product sees some tokens only (experts) a batch counts for the part of its first window.
    whole: gradients' moments with what is off their diagonals.
    """

    def __init__(self, whole: bool = True) -> None:
        self.whole = whole
        self.places: Tensor | None = None
        self.length = 0
        self.weights: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self._latest: dict[str, int] = {}

    def add(self, key: str, rows: Tensor, weights: Tensor | None = None, whole: bool = True) -> None:
        """Add the second moment of rows [..., n], each times its weight, or its diagonal, to the sum at `key`."""
        flat = rows.detach().reshape(-1, rows.shape[-1])
        if key not in self.values:
            self.values[key] = torch.zeros((flat.shape[1],) * (2 if whole else 1))
        weighted = flat if weights is None else flat * weights.reshape(-1, 1)
        before = diagonal(self.values[key]).clone()
        if whole:
            for here in strips(len(self.values[key])):
                self.values[key][here, here.start :].addmm_(flat[:, here].T, weighted[:, here.start :])
        else:
            self.values[key] += (weighted * flat).sum(0)
        if self.places is not None:
            places = self.places if len(flat) == len(self.places) * self.length else self.places[:1]
            if bool((places == places[0]).all()):  # the sums of squares are made already
                places, squares = places[:1], (diagonal(self.values[key]) - before).clamp_min(0)[None]
            else:
                squares = (weighted * flat).view(len(places), -1, flat.shape[1]).sum(1)
            counts = torch.full((len(places),), len(flat) / len(places))
            self.values.setdefault(f"{PART}{key}", torch.zeros(PARTS, flat.shape[1])).index_add_(0, places, squares)
            self.values.setdefault(f"{PART}n|{key}", torch.zeros(PARTS)).index_add_(0, places, counts)

    def fresh(self) -> Sums:
        """As it was before anything was added."""
        return Sums(self.whole)

    def merge(self, other: Sums) -> None:
        """Add the sums over other tokens."""
        for key, value in other.values.items():
            if key.startswith(LARGEST):
                self.values[key] = torch.maximum(self.values.get(key, value), value)
            else:
                self.plus(key, value)

    def plus(self, key: str, value: Tensor) -> None:
        """Add to the sum at `key`, or begin it, in place."""
        known = self.values.get(key)
        self.values[key] = value if known is None else known.add_(value)

    def inputs(self, sites: list[Site], x: Tensor, y: Tensor) -> None:
        """A product's input; siblings that read the same one share the sum."""
        reads = sites[0].reads
        owner = self._latest.setdefault(f"owner|{reads}", hash(sites[0].name))
        if owner == hash(sites[0].name):
            if self.weights is not None and self.weights.numel() != x.numel() // x.shape[-1]:
                raise InputError(f"{sites[0].name} sees some tokens only; profile models with experts without token weights")
            self.add(reads, x, self.weights)
            self.plus(f"n|{reads}", torch.tensor(float(x.numel() // x.shape[-1])))
            keep_largest(self.values, reads, x)
            self._latest[reads] = x.data_ptr()
        elif self._latest[reads] != x.data_ptr():
            raise AssertionError(f"{sites[0].name} does not read what its siblings read")

    def gradients(self, sites: list[Site], x: Tensor, y: Tensor) -> None:
        """A product's output: its gradient is summed when it arrives."""

        def arrived(gradient: Tensor) -> None:
            for site in sites:
                rows = slice(*site.rows) if site.rows else slice(None)
                self.add(f"{site.name}|{site.reads}", gradient[..., rows], whole=self.whole)

        if y.requires_grad:
            y.register_hook(arrived)

    def finished(self) -> dict[str, Tensor]:
        """The sums, of second moments what is below the diagonal as well, which `add` leaves out."""
        for value in self.values.values():
            if value.ndim == 2 and value.shape[0] == value.shape[1]:
                mirror(value)
        return self.values

    def untouched(self, sites: list[Site]) -> None:
        """Sites that no token met (experts, say) get zeros."""
        for site in sites:
            self.values.setdefault(site.reads, torch.zeros(site.shape[1], site.shape[1]))
            self.values.setdefault(f"n|{site.reads}", torch.tensor(0.0))

    def unreached(self, sites: list[Site]) -> None:
        """Sites that no gradient reached get zeros."""
        for site in sites:
            self.values.setdefault(f"{site.name}|{site.reads}", torch.zeros((site.shape[0],) * (2 if self.whole else 1)))


class LargestCached(DynamicCache):
    """A cache that keeps nothing but the largest magnitudes of the keys and values that it gets, in `values`."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with keys and values [batch, heads, tokens, size] as it would cache them."""
        keep_largest(self.values, "keys", key_states)
        keep_largest(self.values, "values", value_states)
        return key_states, value_states


def keep_largest(values: dict[str, Tensor], key: str, met: Tensor) -> None:
    """Keep the largest magnitude met so far."""
    largest = torch.stack(met.detach().aminmax()).abs().amax().float() if met.numel() else torch.tensor(0.0)
    values[f"{LARGEST}{key}"] = torch.maximum(values.get(f"{LARGEST}{key}", torch.tensor(0.0)), largest)


class Summed(Protocol):
    """Sums that batches can make apart."""

    def fresh(self) -> Any:
        """As it was before anything was added."""

    def merge(self, other: Any) -> None:
        """Add the sums over other tokens."""


def gather(run: Callable[..., None], count: int, totals: Sequence[Summed], together: bool) -> None:
    """`run(b, *sums)` of every b below `count`, which adds to the sums that it is given.

    together: side by side, each to sums of its own, which are added up in order; else one after another to the totals.
    """

    if not together:
        for b in range(count):
            run(b, *totals)
        return

    def alone(b: int) -> list[Summed]:
        own = [total.fresh() for total in totals]
        run(b, *own)
        return own

    for found in in_turn(alone, range(count), together):
        with threads_for(0):
            for total, own in zip(totals, found, strict=True):
                total.merge(own)
