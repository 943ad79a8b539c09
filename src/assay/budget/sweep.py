"""The frontier: what every size would cost in quality, from one profile, the uniform plan beside each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from assay.budget import planners
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision
from assay.budget.offers import ladder
from assay.budget.size import bits_to_bytes
from assay.engines.contract import Contract
from assay.measure.profile import Profile
from assay.model.errors import InputError

STEP = 0.25
MOST_POINTS = 1000


def parse_range(text: str) -> tuple[float, float, float]:
    """(low, high, step) in bits of "2:8" or "2:8:0.5". Raises InputError."""
    try:
        low, high, step = [float(part) for part in text.split(":")] + [STEP] * (text.count(":") == 1)
    except ValueError:
        raise InputError(f"--sweep {text}: give bits from and to, like 2:8, or with a step, like 2:8:0.5") from None
    if not (0 < low <= high < math.inf and 0 < step < math.inf) or (high - low) / step > MOST_POINTS:
        raise InputError(f"--sweep {text}: bits must rise from above zero, in at most {MOST_POINTS} steps")
    return low, high, step


def frontier(
    profile: Profile, low: float, high: float, step: float, contract: Contract, method: str, keep: Sequence[str], planner: str
) -> dict[str, Any]:
    """Best plans at low, low + step, ... of average bits in the blocks, ended by `high`; what can't be reached is left out.

    Each point: target, bits, bytes of all tensors, KL in nats with its interval, and the best uniform level that fits.
    Raises InputError where no point can be reached.
    """
    rungs = [[[d for d in m if d.inside] for m in menus] for menus in ladder(profile, contract, method, False, keep)]
    menus = rungs[-1]
    forecast, divide, flatten = Forecast.from_index(profile.index), planners.get(planner).plan, planners.get("uniform").plan
    count, most = sum(d.count for d in menus[0]), sum(d.options[-1].nbytes for d in menus[0])
    rest = sum(profile.index["names"].values()) - most
    reach = [8 * n / count for n in (min(map(_least, menus)), most)]
    targets = [t for i in range(int((high - low) / step + 1e-9) + 1) if reach[0] <= (t := round(low + i * step, 9)) <= reach[1]]
    if not targets:
        raise InputError(f"--sweep: nothing between {low:g} and {high:g} bits; this model and engine allow "
                         f"{reach[0]:.3f} to {reach[1]:.3f}")  # fmt: skip
    points = []
    for target in targets:
        limit = bits_to_bytes(target, count)
        fitting = next(fit for menus in rungs if (fit := [menu for menu in menus if _least(menu) <= limit]))
        best, flat = (
            min((_facts(m, plan(m, limit), forecast, method, rest, count) for m in fitting), key=lambda f: f["predicted"])
            for plan in (divide, flatten)
        )
        points.append({"target": target} | best | {"uniform": flat})
    return {
        "profile": str(profile.folder), "profile_bytes": profile.nbytes, "engine": contract.name, "method": method,
        "achievable_bits": reach, "source_bytes": int(profile.index["file_bytes"]), "points": points,
    }  # fmt: skip


def _least(options: Sequence[Decision]) -> int:
    return sum(d.options[0].nbytes for d in options)


def _facts(
    options: Sequence[Decision], choice: Sequence[int], forecast: Forecast, method: str, rest: int, count: int
) -> dict[str, Any]:
    picked = [d.options[c] for d, c in zip(options, choice, strict=True)]
    nbytes = sum(o.nbytes for o in picked)
    low, expected, high = forecast.kl(method, forecast.total(picked))
    levels = {o.level or "keep" for d, o in zip(options, picked, strict=True) if len(d.options) > 1} or {"keep"}
    return {
        "bits": 8 * nbytes / count, "bytes": rest + nbytes, "predicted": expected, "predicted_low": low,
        "predicted_high": high, "levels": len(levels), "level": levels.pop() if len(levels) == 1 else None,
    }  # fmt: skip
