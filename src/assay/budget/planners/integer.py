"""The plan with the least damage, proven: a 0/1 program solved by HiGHS.

Options that the Lagrangian dual proves to be in no better plan are left out first (reduced-cost fixing).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from assay.budget.menu import Decision
from assay.budget.planners import lagrange, refuse_impossible
from assay.budget.planners._quiet import stdout_to_stderr
from assay.budget.table import Floats, Ints, Table

SECONDS = 30.0
CLOSE = 1e-12
ROW_SCALE = 1e6
"""The byte row's right-hand side. HiGHS accepts a violation of 1e-6 there: 1e-12 of the budget."""
GAP_SCALE = 1e4
"""The objective's value of the whole gap to be closed. HiGHS stops at 1e-6 of it: 1e-10 of the gap."""
ATTEMPTS = 4


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The least damage within `budget` bytes, or the best found in the time allowed. Raises InputError."""
    return solve(decisions, budget, SECONDS)[0]


def solve(decisions: Sequence[Decision], budget: int, seconds: float) -> tuple[list[int], float]:
    """(option per decision, proven lower bound on the damage in nats per token) within `seconds`.

    Raises InputError when nothing fits `budget` bytes.
    """
    refuse_impossible(decisions, budget)
    table, best = Table.of(decisions), np.array(lagrange.plan(decisions, budget), dtype=np.int64)
    bound, price = lagrange.dual(table, budget)
    until, limit = time.monotonic() + seconds, budget
    for attempt in range(ATTEMPTS):
        gap = table.damage_of(best) - bound
        if gap <= CLOSE * table.damage_of(best) or (remaining := until - time.monotonic()) <= 0:
            break
        choice, proven = _solve(table, best, limit, price, gap, remaining)
        bound = max(bound, proven) if attempt == 0 else bound
        if choice is None:
            break
        excess = table.bytes_of(choice) - budget
        if excess <= 0:
            best = choice if table.damage_of(choice) < table.damage_of(best) else best
            break
        limit -= excess
    return best.tolist(), min(bound, table.damage_of(best))


def _solve(table: Table, best: Ints, limit: int, price: float, gap: float, seconds: float) -> tuple[Ints | None, float]:
    """(choice or None, lower bound on the damage) of the program without hopeless options."""
    owner, option = hopeful(table, best, price, gap)
    base = table.nbytes.min(1)
    room = max(limit - int(base.sum()), 1)
    least = table.damage.min(1)
    with stdout_to_stderr():  # HiGHS reports some repairs there whatever its options
        found = milp(
            (table.damage[owner, option] - least[owner]) / gap * GAP_SCALE,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=_constraints(owner, (table.nbytes[owner, option] - base[owner]) / room),
            options={"time_limit": max(seconds, 0.01), "mip_rel_gap": 0.0},
        )
    proven = float(least.sum()) + _dual_bound(found) / GAP_SCALE * gap
    return (None if found.x is None else _choice(found, owner, option, best)), proven


def hopeful(table: Table, best: Ints, price: float, gap: float) -> tuple[Ints, Ints]:
    """(decision, option) of whatever can be in a plan better than `best`, and of `best` itself."""
    cost = table.damage + price * table.nbytes
    reduced = cost - cost.min(1, keepdims=True)
    hopeful = reduced <= gap * (1 + 1e-6) + 1e-12 * np.abs(cost).max(1, keepdims=True)
    hopeful &= np.arange(table.damage.shape[1]) < table.count[:, None]
    hopeful[table.rows, best] = True
    owner, option = np.nonzero(hopeful)
    return owner, option


def _constraints(owner: Ints, share: Floats) -> list[LinearConstraint]:
    one_each = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    return [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(coo_array(share[None, :] * ROW_SCALE), -np.inf, ROW_SCALE),
    ]


def _dual_bound(found: OptimizeResult) -> float:
    """HiGHS's proven bound less its tolerances, in units of the objective; -inf without one."""
    value = found.mip_dual_bound
    return -np.inf if value is None or not np.isfinite(value) else float(value) - 1e-6 - 1e-12 * abs(value)


def _choice(found: OptimizeResult, owner: Ints, option: Ints, best: Ints) -> Ints:
    picked = found.x > 0.5
    choice = best.copy()
    choice[owner[picked]] = option[picked]
    return choice
