"""The command line, called in this process, and what a failure looks like."""

from __future__ import annotations

from pathlib import Path

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


def everything(folder: Path) -> dict[str, bytes | None]:
    """What lies below a folder: the bytes of its files, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(capfd: pytest.CaptureFixture[str], folder: Path, arguments: tuple[object, ...], words: str) -> None:
    """The command ends with code 2 and one line that holds `words`, and leaves everything beside `folder` as it was."""
    before = everything(folder.parent)
    capfd.readouterr()
    code, out, err = call(capfd, *arguments)
    assert (code, out) == (2, "")
    assert words in one_line(err)
    assert everything(folder.parent) == before
