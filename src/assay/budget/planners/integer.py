"""The plan with the least damage, proven: a 0/1 program solved by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from assay.budget.menu import Decision
from assay.budget.planners import lagrange, refuse_impossible

SECONDS = 30.0


def plan(decisions: Sequence[Decision], budget: int) -> list[int]:
    """The least damage within `budget` bytes, or the best found in the time allowed. Raises InputError."""
    return solve(decisions, budget, SECONDS)[0]


def solve(decisions: Sequence[Decision], budget: int, seconds: float) -> tuple[list[int], float]:
    """(option per decision, proven lower bound on the damage in nats per token)."""
    refuse_impossible(decisions, budget)
    start = lagrange.plan(decisions, budget)
    bound = lagrange.lower_bound(decisions, budget)
    damages = np.array([o.damage for d in decisions for o in d.options])
    sizes = np.array([o.nbytes for d in decisions for o in d.options], dtype=float)
    scale = damages.max() or 1.0
    owner = np.repeat(np.arange(len(decisions)), [len(d.options) for d in decisions])
    one_each = coo_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    found = milp(
        damages / scale,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :] / budget, -np.inf, 1.0)],
        options={"time_limit": seconds, "mip_rel_gap": 1e-9},
    )
    if found.mip_dual_bound is not None:
        bound = max(bound, float(found.mip_dual_bound) * scale)
    if found.x is None:
        return start, bound
    firsts = np.concatenate([[0], np.cumsum([len(d.options) for d in decisions])])
    choice = [int(found.x[a:b].argmax()) for a, b in zip(firsts[:-1], firsts[1:], strict=True)]
    fits = sum(d.options[c].nbytes for d, c in zip(decisions, choice, strict=True)) <= budget
    better = fits and _damage(decisions, choice) <= _damage(decisions, start)
    best = choice if better else start
    return best, min(bound, _damage(decisions, best))


def _damage(decisions: Sequence[Decision], choice: Sequence[int]) -> float:
    return sum(d.options[c].damage for d, c in zip(decisions, choice, strict=True))
