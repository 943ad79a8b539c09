"""assay inspect: what is in a model."""

from __future__ import annotations

from assay.cli.answer import Answer, command
from assay.cli.options import Json, Model


@command()
def run(model: Model, as_json: Json = False) -> Answer:
    """What is in it: blocks, groups, parameters, bytes, ties, and what can't be touched."""
    import assay
    from assay.report import tables

    found = assay.inspect(model)
    return Answer(found, lambda: tables.inspection(found))
