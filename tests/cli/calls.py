"""The command line, called in this process, and what a failure looks like."""

from __future__ import annotations

import pytest

from assay.cli.main import main


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return int(stop.value.code or 0), out, err


def one_line(text: str) -> str:
    """The text, which must be the one line of a failure."""
    assert text.startswith("assay: "), text
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    return text
