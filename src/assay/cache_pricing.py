"""What storing the keys or the values of one layer smaller costs, in nats per token, and a menu of that for a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from assay.attaching import named
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.files import save_json
from assay.runtime.codecs import Side
from assay.runtime.hook import attached
from assay.runtime.policy import Packer, Stack

LEVELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}), "int4": ("kivi", {"bits": 4}), "int2": ("kivi", {"bits": 2}),
}  # fmt: skip
FILE = "cache.json"
TAIL_SHARE = 4
WINDOWS, WINDOW = 8, 256


@dataclass(frozen=True)
class CachePrice:
    """One layer's keys or values at one level.

    bytes_per_token: of one sequence, scales included; nats: measured KL per token when nothing else is changed.
    """

    layer: int
    side: str
    level: str
    bytes_per_token: float
    nats: float


@dataclass(frozen=True, eq=False)
class Alone:
    """A packer on one side of one layer only."""

    policy: Packer
    layer: int
    side: int
    stage: ClassVar[int] = 2

    def sides(self, layer: int) -> tuple[Side | None, Side | None]:
        """See `Packer`."""
        found = self.policy.sides(layer)[self.side] if layer == self.layer else None
        return (found, None) if self.side == 0 else (None, found)


@torch.no_grad()
def cache_prices(model: PreTrainedModel, ids: Tensor, levels: Sequence[str] = tuple(LEVELS)) -> list[CachePrice]:
    """Prices of every layer, side ("keys", "values") and level, the stored one ("exact") at 0 among them.

    ids: int [windows, tokens]; the last quarter of each window reads the rest from the cache, and its KL from the model's
    own prediction is the price. Raises InputError for unknown levels and for models that cache policies don't know.
    """
    if unknown := [x for x in levels if x not in LEVELS]:
        raise InputError(f"unknown cache level {unknown[0]!r}; there are {', '.join(LEVELS)}")
    if ids.ndim != 2 or ids.shape[1] < 2 * WINDOW // TAIL_SHARE:
        raise InputError(f"text of shape {list(ids.shape)}; give windows of {2 * WINDOW // TAIL_SHARE} tokens or more")
    reference, exact = _tail(model, ids, Stack())
    prices = []
    for layer, sizes in enumerate(exact):
        for side, name in enumerate(("keys", "values")):
            prices.append(CachePrice(layer, name, "exact", sizes[side], 0.0))
            for level in levels:
                policy, options = LEVELS[level]
                logits, stored = _tail(model, ids, Stack(packers=(Alone(named(policy)(**options), layer, side),)))
                kl = (reference.exp() * (reference - logits)).sum(-1).mean()
                prices.append(CachePrice(layer, name, level, stored[layer][side], max(float(kl), 0.0)))
    return prices


def cache_menu(prices: Sequence[CachePrice], context: int, batch: int) -> dict[tuple[int, str], list[tuple[str, int, float]]]:
    """For each layer and side what a plan may choose: (level, bytes at a context and batch, nats), fewest bytes last.

    Levels that another of no more bytes and no more nats makes useless are left out.
    """
    menu: dict[tuple[int, str], list[tuple[str, int, float]]] = {}
    for p in prices:
        menu.setdefault((p.layer, p.side), []).append((p.level, round(p.bytes_per_token * context * batch), p.nats))
    return {place: _front(options) for place, options in menu.items()}


def price_cache(source: str | Path, folder: str | Path, calibration: str | Path | None = None) -> list[CachePrice]:
    """Prices of a checkpoint's cache, written as cache.json into the folder of its profile."""
    checkpoint = Checkpoint.open(source)
    text = windows(checkpoint, calibration, "calibration", WINDOWS * WINDOW, WINDOW, StreamedModel(checkpoint).vocabulary)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    prices = cache_prices(model, text.ids)
    save_json(Path(folder) / FILE, {"text": text.digest, "prices": [dataclasses.asdict(p) for p in prices]})
    return prices


def _front(options: list[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    kept: list[tuple[str, int, float]] = []
    for option in sorted(options, key=lambda o: (o[2], o[1])):
        if not kept or option[1] < kept[-1][1]:
            kept.append(option)
    return kept


def _tail(model: PreTrainedModel, ids: Tensor, stack: Stack) -> tuple[Tensor, list[tuple[float, float]]]:
    """Log-probabilities of the last quarter, and each layer's bytes per token of what was stored of keys and values."""
    start = ids.shape[1] - ids.shape[1] // TAIL_SHARE
    with attached(model, stack) as found:
        cache = model(input_ids=ids[:, :start], use_cache=True, logits_to_keep=1).past_key_values
        sizes = []
        for layer in found.layers:
            lanes = layer.lanes
            keys, values = (sum(t.bytes_per_slot() for t in tapes) / len(ids) for tapes in
                            ([x.keys for x in lanes], [x.values for x in lanes]))  # fmt: skip
            sizes.append((keys, values))
        logits = model(input_ids=ids[:, start:], past_key_values=cache, use_cache=True).logits
    return logits.log_softmax(-1), sizes
