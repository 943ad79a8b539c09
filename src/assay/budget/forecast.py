"""From priced damage to a promised KL: corrections learned from rehearsals and whole-model probes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from assay.budget.menu import Option
from assay.budget.prices import MEASURED_BITS
from assay.methods.grid.trellis import distortion
from assay.model.level import Level

OPTIMISED = {
    "nearest": 1.0,
    "clip": 1.0,
    "gptq": 1.13,
    "two_sided": 1.26,
    "trellis": 1.10,
    "admm": 1.28,
    "adaround": 1.20,
    "sign_round": 1.18,
}
"""KL per unit of damage relative to round-to-nearest's: a solver fits the noise of H and G too. Between what one
level everywhere (2 to 6 bits) and mixed plans measured on pebble (two-sided: 1.2 and 1.5) and the built-in model (1.0, 1.1)."""
SPREAD = 0.20
"""Root mean square of log(measured / predicted), rounded up: 0.18 over 60 random plans of six methods on pebble and the
built-in model, texts apart from those of the probes (benchmarks/promise.py, PROMISE.md)."""

UNKNOWN_SPREAD = 0.5
"""The probes' own spread where there is one window only, which tells none."""

STRAIN = 6.0
"""How much more than its second-order price a coarse rounding costs: exp(STRAIN x its share of the weights' energy).
Without it a plan takes single matrices down to 1 bit. Plans of pebble at 1.8 and 2.28 bits measured 0.0630 and 0.0288
nats at 0, 0.0606 and 0.0240 at 3, 0.0581 and 0.0234 at 6, 0.0582 and 0.0236 at 10."""

PROBED_SPREAD = 0.10
"""The same after a whole-model probe with the method itself."""


def _strain(level: Level) -> float:
    return math.exp(STRAIN * distortion(level.bits)) if level.format == "trellis" else 1.0


@dataclass(frozen=True)
class Forecast:
    """Corrections of one profile.

    ratios: method -> block -> bits -> damage of the solver over its price, rehearsed on some blocks.
    probes: (damage, KL) of whole-model probes by round to nearest, falling; probe_spread: standard error of
    their KL as a share of it, over the windows that were probed; first: how much more than elsewhere a nat of damage
    in the first block costs.
    """

    ratios: Mapping[str, Mapping[int, Mapping[int, float]]]
    probes: Sequence[tuple[float, float]]
    probe_spread: float = 0.0
    first: float = 1.0

    @classmethod
    def from_index(cls, index: Mapping[str, Any]) -> Forecast:
        ratios = {
            m: {int(block): {int(b): float(r) for b, r in row.items()} for block, row in rows.items()}
            for m, rows in index["ratios"].items()
        }
        points = [(float(d), float(k)) for d, k in index["probes"]]
        return cls(ratios, points, float(index["probe_spread"]), float(index["first"]))

    def damage(self, method: str, level: Level, price: float, block: int | None) -> float:
        """Damage that `method` is expected to leave at `level` in a block, or outside them all (None), nats per token."""
        return price * self._ratio(method, level.bits, block) * self.excess(block) * _strain(level)

    def excess(self, block: int | None) -> float:
        """How much more than its second-order price a change in a block costs, beside the other blocks."""
        return self.first if block == 0 else 1.0

    def _ratio(self, method: str, bits: float, block: int | None) -> float:
        """Of the nearest width; between rehearsed blocks linear in its logarithm, constant outside them."""
        rows = sorted((self.ratios.get(method) or {0: {MEASURED_BITS: 1.0}}).items())
        points = [(number, row[min(row, key=lambda b: abs(b - bits))]) for number, row in rows]
        if block is None:
            return points[-1][1]
        for (low, before), (high, after) in pairwise(points):
            if low <= block < high and before > 0 < after:
                return before * (after / before) ** ((block - low) / (high - low))
        return points[0 if block < points[0][0] else -1][1]

    def total(self, options: Iterable[Option]) -> float:
        """Damage that a plan's options are expected to leave together, nats per token: without what keeps planners from
        straining single matrices."""
        return sum(o.damage / (_strain(Level.parse(o.level)) if o.level else 1.0) for o in options)

    def kl(self, method: str, damage: float) -> tuple[float, float, float]:
        """(low, expected, high) KL in nats per token for a total damage; the interval covers 95%."""
        if damage <= 0:
            return 0.0, 0.0, 0.0
        expected = damage * self._factor(damage) * OPTIMISED.get(method, 1.0)
        spread = 1.96 * math.hypot(SPREAD, self.probe_spread)
        return expected * math.exp(-spread), expected, expected * math.exp(spread)

    def corrected(self, plan_kl: float, probe_kl: float, measured: float) -> tuple[float, float, float]:
        """(low, expected, high) of a plan's KL once another plan of the same method and budget was measured."""
        expected = plan_kl * measured / probe_kl if probe_kl > 0 else plan_kl
        spread = 1.96 * math.hypot(PROBED_SPREAD, self.probe_spread)
        return expected * math.exp(-spread), expected, expected * math.exp(spread)

    def damage_for(self, method: str, kl: float) -> float:
        """The largest damage whose KL's upper bound stays within `kl`."""
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self.kl(method, middle)[2] <= kl else (low, middle)
        return low

    def _factor(self, damage: float) -> float:
        """KL per unit of damage, between probes linear in the logarithms, constant outside them."""
        points = sorted((math.log(d), math.log(k / d)) for d, k in self.probes if d > 0 and k > 0)
        if not points:
            return 1.0
        x = math.log(damage)
        if x <= points[0][0] or len(points) == 1:
            return math.exp(points[0][1])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x <= x1:
                return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
        return math.exp(points[-1][1])
