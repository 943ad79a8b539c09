"""assay explore: a page on this machine where a profile's budget is dragged."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from assay.cli.answer import Answer, command
from assay.cli.options import Engine, Method

Source = Annotated[Path, typer.Argument(metavar="PROFILE", help="Folder that assay profile wrote.", show_default=False)]
Port = Annotated[int, typer.Option("--port", metavar="N", help="Port of 127.0.0.1; a free one if not given.", min=0, max=65535)]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser of this machine.")]


@command()
def run(
    profile: Source, engine: Engine = "transformers", method: Method = "auto", port: Port = 0, opened: Open = False
) -> Answer:  # fmt: skip
    """Serve a page where budget, engine, context and pins are changed and the plan follows; Ctrl-C ends it."""
    from assay.explore.server import Server, show
    from assay.explore.session import Session
    from assay.measure.profile import Profile

    with Server(Session(Profile.open(profile)), engine, method, port) as server, suppress(KeyboardInterrupt):
        print(f"{server.address}\nWhoever knows this address may use the page; Ctrl-C ends it.", file=sys.stderr, flush=True)
        if opened:
            show(server.address)
        server.serve_forever()
    return Answer({"profile": str(profile)}, lambda: "closed")
