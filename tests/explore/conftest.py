"""A small profile and a server that shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import save, text_file

import assay
from assay.explore.server import Server
from assay.explore.session import Session
from assay.measure.profile import Profile


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    assay.profile(
        save("qwen3", folder / "m"), folder / "p", calibration=text_file(folder), tokens=1024, window=32, levels=["q8_0", "q5_0"]
    )
    return folder / "p"


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers of profiles; they end with the file of tests."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(folder: Path, port: int = 0) -> Server:
        server = Server(Session(Profile.open(folder)), "transformers", "auto", port)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], profile: Path) -> Server:
    return serve(profile)
