"""Whether an engine holds a plan, told before anything is measured: which groups it can't, and what they would become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from assay.budget.menu import SiteRow, together
from assay.budget.offers import refused, rows
from assay.budget.plan import Plan
from assay.engines.contract import Contract
from assay.measure.stream import StreamedModel
from assay.methods import base
from assay.model.errors import InputError
from assay.model.level import Level

EXAMPLES = 3


def check_held(plan: Plan, model: StreamedModel, contract: Contract) -> None:
    """Raises InputError naming the groups of a plan that an engine can't hold, why, and the nearest level that it has.

    Sites that the model lacks are left to `validate`.
    """
    found = rows(model, model.checkpoint.kept_nbytes)
    whole = contract.refusal(model.anatomy.family, model.anatomy.has_experts)
    if whole and plan.levels:
        raise InputError(f"the plan can't be carried out for {contract.name}: {whole}")
    groups = [g for g in together(found, contract.fused, contract.experts_by_role) if any(r.name in plan.levels for r in g)]
    problems: dict[str, list[str]] = {}
    for group in groups:
        if reason := _problem(group, plan.levels, contract, plan.method):
            problems.setdefault(reason, []).append(_named(group))
    if not problems:
        return
    count = sum(map(len, problems.values()))
    parts = [f"{_some(names)}: {reason}" for reason, names in problems.items()]
    raise InputError(
        f"{contract.name} can't hold {count} of the plan's {len(groups)} groups: {'; '.join(parts)}; "
        "change the plan, or make one for this engine with assay plan"
    )


def _problem(group: Sequence[SiteRow], levels: Mapping[str, Level], contract: Contract, method: str) -> str | None:
    """Why an engine can't hold the sites of one group at their levels; None when it can."""
    wanted = {levels.get(row.name) for row in group}
    if len(wanted) > 1:
        names = " and ".join(sorted("keep" if x is None else x.name for x in wanted))
        return f"fused in {contract.name}, so give them one level, not {names}"
    (level,) = wanted
    assert level is not None, "groups without a level are left out"
    for row in group:
        try:
            level.groups(row.shape[1])
        except InputError as error:
            return str(error)
        if reason := refused(contract, row):
            return f"{reason}; it would stay as it is"
        if not contract.takes(level, row.shape[1], row.expert is not None, row.shape[0]):
            return f"there is no {level.name}; the nearest is {_nearest(level, row, contract, method)}"
    return None


def _nearest(level: Level, row: SiteRow, contract: Contract, method: str) -> str:
    offered = (x for x in base.get(method)().levels(row.shape[1]))
    held = [x for x in offered if contract.takes(x, row.shape[1], row.expert is not None, row.shape[0])]
    size = level.group_size or row.shape[1]

    def distance(x: Level) -> tuple[float, float, bool]:
        return abs(x.bits - level.bits), abs((x.group_size or row.shape[1]) - size), x.symmetric != level.symmetric

    return min(held, key=distance).name if held else "keep"


def _named(group: Iterable[SiteRow]) -> str:
    return " + ".join(row.name.removesuffix(".weight") for row in group)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
