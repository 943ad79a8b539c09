"""Rankings of weight matrices as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table

from assay.budget.sensitivity import Ranking, Row
from assay.report.tables import UNKNOWN, number

SHOWN = 20


def shown(rankings: Sequence[Ranking], correlations: Mapping[str, Mapping[str, float | None]]) -> Group:
    """One ranking with its error bars, or several side by side; below it what to keep."""
    parts: list[RenderableType] = [_alone(rankings[0])] if len(rankings) == 1 else [_beside(rankings), _agreement(correlations)]
    return Group(*parts, *(_answer(r) for r in rankings))


def _alone(ranking: Ranking) -> Group:
    title = f"{ranking.name}: {'nats per token of' if ranking.prices else 'order for'} rounding to {ranking.bits} bits"
    table = Table("", "matrix", "score", f"95% over {ranking.samples}" if ranking.samples else "95%", "per weight", "kept again",
                  title=title, title_justify="left")  # fmt: skip
    for place, row in enumerate(ranking.rows[:SHOWN]):
        bounds = UNKNOWN if row.low is None else f"{_score(row.low)} to {_score(row.high)}"
        each = _score(row.score / row.count * 1e6) + "e-6" if ranking.prices else UNKNOWN
        again = UNKNOWN if row.again is None else f"{row.again:.0%}"
        table.add_row(f"{place + 1}{' *' if row.keep else ''}", row.site, _score(row.score), bounds, each, again)
    lines = [f"{len(ranking.rows) - SHOWN} more; --json lists all"] if len(ranking.rows) > SHOWN else []
    return Group(table, *lines, _blocks(ranking))


def _blocks(ranking: Ranking) -> str:
    """Blocks by their sums, or by the score that is the same for all of their matrices."""
    rows = sorted(ranking.rows, key=lambda row: row.block)
    scores = {block: _of_block(list(inside), ranking.prices) for block, inside in groupby(rows, key=lambda row: row.block)}
    order = sorted(scores, key=lambda block: -scores[block])
    return "blocks: " + ", ".join(f"{block} ({_score(scores[block])})" for block in order)


def _of_block(rows: Sequence[Row], prices: bool) -> float:
    return sum(row.score for row in rows) / (1 if prices else len(rows))


def _beside(rankings: Sequence[Ranking]) -> Table:
    """The place of every matrix in every ranking, in the order of the first."""
    places = [{row.site: f"{i + 1}{' *' if row.keep else ''}" for i, row in enumerate(r.rows)} for r in rankings]
    table = Table("matrix", *(r.name for r in rankings), title="places (* to keep)", title_justify="left")
    for row in rankings[0].rows[:SHOWN]:
        table.add_row(row.site, *(place[row.site] for place in places))
    table.add_row("seconds", *(f"{r.seconds:.1f}" for r in rankings), style="dim")
    return table


def _agreement(correlations: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = Table("Spearman's correlation of scores", *correlations)
    for name, row in correlations.items():
        table.add_row(name, *(UNKNOWN if c is None else f"{c:.2f}" for c in row.values()))
    return table


def _answer(ranking: Ranking) -> str:
    kept = [row for row in ranking.rows if row.keep]
    weights = sum(row.count for row in kept) / sum(row.count for row in ranking.rows)
    loss = "" if ranking.share is None else f" and {ranking.share:.0%} of the loss at {ranking.bits} bits"
    options = " ".join(f"--keep '{pattern}'" for pattern in ranking.patterns)
    return f"{ranking.name} keeps {weights:.1%} of the weights{loss}: {options}"


def _score(value: float | None) -> str:
    if value is not None and value < 0:
        return f"-{number(-value)}"
    return number(value)
