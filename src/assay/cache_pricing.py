"""What storing the keys or the values of one layer smaller costs, or dropping some of its tokens, in nats per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from assay.budget.caches import EXACT, FILE, CachePrice, load, save
from assay.caching import engine_levels, evictor, levels
from assay.measure.stream import StreamedModel
from assay.measure.text import windows
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError
from assay.model.files import read_note
from assay.model.progress import Progress, Silent
from assay.profiling import window_length
from assay.prompted import TAIL_SHARE, Prompted
from assay.runtime.codecs import Side
from assay.runtime.hook import Attached
from assay.runtime.policy import Packer, Stack

EVICT, SHARES = ("snapkv", "streaming_llm"), (0.5, 0.25, 0.12)
WINDOWS, WINDOW, FITTED = 8, 256, 24
"""Windows that are priced on, their tokens, and the windows after them that levels which need text are fitted to."""
SHORTEST = 2 * WINDOW // TAIL_SHARE
"""Tokens that a window must have."""
POSITION = 4
"""Bytes of a position."""
SIDES = ("keys", "values")


@dataclass(frozen=True, eq=False)
class Alone:
    """A packer on some sides of one layer, or of all where `layer` is None."""

    policy: Packer
    layer: int | None
    on: tuple[str, ...]
    stage: ClassVar[int] = 2

    def sides(self, layer: int) -> tuple[Side | None, Side | None]:
        """See `Packer`."""
        if self.layer not in (None, layer):
            return None, None
        keys, values = self.policy.sides(layer)
        return keys if "keys" in self.on else None, values if "values" in self.on else None


@torch.no_grad()
def cache_prices(
    model: PreTrainedModel, ids: Tensor, names: Sequence[str] | None = None, calibration: Tensor | None = None,
    evict: Sequence[str] = EVICT, progress: Progress | None = None,
) -> list[CachePrice]:  # fmt: skip
    """Prices of every layer at every level, of other engines' cache types for all layers, and of dropping tokens.

    ids: int [windows, tokens]; the last quarter of each window reads the rest from the cache, and its KL from the model's
    own prediction is the price. names: levels, all by default; calibration: int [windows, tokens], for levels that need it,
    `ids` by default; evict: policies that drop tokens. Raises InputError for unknown levels and for models that cache
    policies don't know.
    """
    table, own = levels(), list(names if names is not None else levels())
    if unknown := [x for x in own if x not in table]:
        raise InputError(f"unknown cache level {unknown[0]!r}; there are {', '.join(table)}")
    if ids.ndim != 2 or ids.shape[1] < SHORTEST:
        raise InputError(f"text of shape {list(ids.shape)}; give windows of {SHORTEST} tokens or more")
    bench = _Bench.of(model, ids)
    packers = {n: _ready(table[n], model, ids if calibration is None else calibration) for n in own}
    everywhere = [(("both",) if n in ("fp8", "quanto4") else SIDES, n, p) for n, p in engine_levels().items()]
    depth, heads = bench.depth, bench.heads
    prices: list[CachePrice] = []
    with (progress or Silent()).task("pricing the cache", depth + 1) as advance:
        for layer in range(depth):
            prices += [CachePrice(layer, side, EXACT, bench.exact[layer][i], 0.0) for i, side in enumerate(SIDES)]
            prices += [bench.stored(layer, side, name, packer) for side in SIDES for name, packer in packers.items()]
            prices.append(CachePrice(layer, "tokens", "1", 2 * POSITION, 0.0))
            for name in evict:
                for share in SHARES:
                    apart = heads if name == "snapkv" else 1
                    nats = bench.nats(Stack(evictor(name, [share if i == layer else 1.0 for i in range(depth)])))
                    prices.append(CachePrice(layer, "tokens", f"{name} {share:g}", POSITION * (1 + apart), nats))
            advance()
        for sides, name, packer in everywhere:
            for side in sides:
                nats = bench.nats(Stack(packers=(Alone(packer, None, SIDES if side == "both" else (side,)),)))
                prices.append(CachePrice(None, side, name, 0.0, nats))
        advance()
    return prices


@dataclass(frozen=True)
class _Bench:
    """A prompt of so many windows, the model's own log-probabilities after it, bytes per token of exact keys and values."""

    prompt: Prompted
    windows: int
    reference: Tensor
    exact: list[list[float]]
    heads: int

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Tensor) -> _Bench:
        prompt = Prompted.of(model, ids)
        reference, found = prompt.tail(Stack())
        exact = [[_tape(found, i, side).bytes_per_slot(True) / len(ids) for side in SIDES] for i in range(len(found.layers))]
        config: Any = model.config
        return cls(prompt, len(ids), reference, exact, getattr(config, "num_key_value_heads", config.num_attention_heads))

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.exact)

    def stored(self, layer: int, side: str, name: str, packer: Packer) -> CachePrice:
        """The price of one side of one layer at a level."""
        logits, found = self.prompt.tail(Stack(packers=(Alone(packer, layer, (side,)),)))
        tape, at = _tape(found, layer, side), packer.sides(layer)[SIDES.index(side)]
        assert at is not None
        once = sum(4 * m.vectors.numel() for m in at.maps if hasattr(m, "vectors"))
        return CachePrice(
            layer, side, name, tape.bytes_per_slot(True) / self.windows, self._kl(logits), at.residual + at.block - 1,
            round(tape.fixed_bytes(True) / self.windows), once,
        )  # fmt: skip

    def nats(self, stack: Stack) -> float:
        """Measured KL per token under a stack."""
        return self._kl(self.prompt.tail(stack)[0])

    def _kl(self, logits: Tensor) -> float:
        return max(float((self.reference.exp() * (self.reference - logits)).sum(-1).mean()), 0.0)


def _tape(found: Attached, layer: int, side: str) -> Any:
    (lane,) = found.layers[layer].lanes
    return lane.keys if side == "keys" else lane.values


def _ready(packer: Packer, model: PreTrainedModel, ids: Tensor) -> Packer:
    return packer.calibrated(model, ids) if "calibration" in getattr(packer, "needs", ()) else packer  # type: ignore[attr-defined]


def priced_length(model: StreamedModel) -> int:
    """Tokens of the windows that a model's cache is priced on. Raises InputError for a model with too few positions."""
    length = window_length(model, WINDOW)
    if length < SHORTEST:
        raise InputError(f"a cache is priced on windows of {SHORTEST} tokens or more; this model has {length} positions")
    return length


def price_cache(
    source: str | Path, folder: str | Path, calibration: str | Path | None = None, progress: Progress | None = None
) -> list[CachePrice]:
    """Prices of a checkpoint's cache, written into the folder of its profile; those of the same text that are there stay."""
    checkpoint = Checkpoint.open(source)
    streamed = StreamedModel(checkpoint)
    length = priced_length(streamed)
    text = windows(checkpoint, calibration, "calibration", (WINDOWS + FITTED) * length, length, streamed.vocabulary)
    facts = {"text": text.digest, "model": checkpoint.fingerprint, "levels": [*levels(), *engine_levels(), *EVICT, *SHARES]}
    if (Path(folder) / FILE).exists() and read_note(Path(folder) / FILE, "damaged").get("facts") == facts:
        return load(Path(folder)) or []
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    apart = text.ids[WINDOWS:] if len(text.ids) >= 2 * WINDOWS else text.ids
    prices = cache_prices(model, text.ids[:WINDOWS], calibration=apart, progress=progress)
    save(Path(folder), prices, facts)
    return prices
