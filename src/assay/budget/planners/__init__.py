"""Planners: each file has `plan(decisions, budget) -> option index per decision`, never above the budget.

Files whose names begin with `_` are helpers.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

from assay.budget.menu import Decision
from assay.model.errors import InputError


def names() -> list[str]:
    """Every planner."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> ModuleType:
    """A planner by its file name. Raises InputError naming the nearest."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        raise InputError(f"unknown planner {name!r}; did you mean {(near or names())[0]}?")
    return importlib.import_module(f"{__name__}.{name}")


def refuse_impossible(decisions: Sequence[Decision], budget: int) -> None:
    """Raises InputError with the achievable range when even the smallest options are above `budget` bytes."""
    low, high = (sum(d.options[i].nbytes for d in decisions) for i in (0, -1))
    if budget < low:
        raise InputError(f"{budget} bytes are too few for these weights; achievable range: {low} to {high}")
