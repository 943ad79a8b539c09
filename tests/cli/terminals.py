"""A program in a pseudo-terminal of so many columns."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import assay

SOURCE = Path(assay.__file__).parents[1]
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def run(columns: int, *arguments: object, piped: bool = False, **environment: str) -> tuple[int, str, str]:
    """Exit code, what a terminal got and, where stdout is `piped` elsewhere, what came there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM")}
    with subprocess.Popen(
        [sys.executable, "-m", "assay", *map(str, arguments)], stdin=theirs, stderr=theirs,
        stdout=subprocess.PIPE if piped else theirs, start_new_session=True,
        env=clean | {"PYTHONPATH": str(SOURCE), "TERM": "xterm-256color"} | environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):
            while part := os.read(ours, 1 << 16):
                shown += part
        os.close(ours)
        out = process.stdout.read() if process.stdout else b""
        return process.wait(), shown.decode("utf-8"), out.decode("utf-8")


def lines(shown: str) -> list[str]:
    """What stood in the terminal, line by line, each state of a bar as one; without codes."""
    parts = re.split(r"[\r\n]+|\x1b\[[0-9]*A|\x1b\[2K", shown)
    return [line for part in parts if (line := CODES.sub("", part).rstrip())]
