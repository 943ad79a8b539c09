"""assay methods: every method with its facts."""

from __future__ import annotations

from assay.cli.answer import Answer, command
from assay.cli.options import Json


@command()
def run(as_json: Json = False) -> Answer:
    """Every method: verb, levels, statistics needed, paper."""
    import assay
    from assay.report import tables

    rows = assay.list_methods()
    return Answer(rows, lambda: tables.methods(rows))
