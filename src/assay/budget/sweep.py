"""The frontier: what every size would cost in quality, from one profile, the uniform plan beside each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from assay.budget import planners, plans
from assay.budget.forecast import Forecast
from assay.budget.menu import Decision
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
    options = plans.decisions(profile, contract, method, False, keep)
    forecast, divide = Forecast.from_index(profile.index), planners.get(planner).plan
    inside = [d for d in options if d.inside]
    count = sum(d.count for d in inside)
    rest = sum(profile.index["names"].values()) - sum(d.options[-1].nbytes for d in inside)
    least, most = (sum(d.options[i].nbytes for d in inside) for i in (0, -1))
    reach = [8 * n / count for n in (least, most)]
    targets = [t for i in range(int((high - low) / step + 1e-9) + 1) if reach[0] <= (t := round(low + i * step, 9)) <= reach[1]]
    if not targets:
        raise InputError(f"--sweep: nothing between {low:g} and {high:g} bits; this model and engine allow "
                         f"{reach[0]:.3f} to {reach[1]:.3f}")  # fmt: skip
    points = []
    for target in targets:
        limit = bits_to_bytes(target, count)
        mixed = _facts(inside, divide(inside, limit), forecast, method, rest, count)
        flat = planners.get("uniform").plan(inside, limit)
        points.append({"target": target} | mixed | {"uniform": _facts(inside, flat, forecast, method, rest, count)})
    return {
        "profile": str(profile.folder), "profile_bytes": profile.nbytes, "engine": contract.name, "method": method,
        "achievable_bits": reach, "source_bytes": int(profile.index["file_bytes"]), "points": points,
    }  # fmt: skip


def _facts(
    options: Sequence[Decision], choice: Sequence[int], forecast: Forecast, method: str, rest: int, count: int
) -> dict[str, Any]:
    picked = [d.options[c] for d, c in zip(options, choice, strict=True)]
    nbytes = sum(o.nbytes for o in picked)
    low, expected, high = forecast.kl(method, forecast.total(picked))
    levels = {o.level or "keep" for o in picked}
    return {
        "bits": 8 * nbytes / count, "bytes": rest + nbytes, "predicted": expected, "predicted_low": low,
        "predicted_high": high, "levels": len(levels), "level": levels.pop() if len(levels) == 1 else None,
    }  # fmt: skip
