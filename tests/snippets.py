"""Code blocks of the documentation: found, run in the order of their page, and compared with the output that they show.

A fenced block is `console` (lines after `$ ` are commands, the rest is what they print; `echo $?` after
one that fails), `python`, or data (`yaml`, `json`,
`text`). A comment on the line before a fence says that a block is not run (`<!-- not run: REASON -->`), that a test of its own
runs it (`<!-- run by: FILE -->`), or which module it takes (`<!-- needs: MODULE -->`). Indented blocks are synopses of commands.
"""

from __future__ import annotations
import __future__

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import traceback
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from assay.cli import main

ROOT = Path(__file__).parents[1]
RUN = ("console", "python")
DATA = ("yaml", "json", "text")
FENCE = re.compile(
    r"(?:<!-- (?P<word>not run|run by|needs): (?P<about>[^\n]*?) -->\n+)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")
DRAWN = re.compile(r"[━─┃│┏┓┗┛┡┩┳┻╇┴└┘┌┐├┤┬┼╋]+")


@dataclass(frozen=True)
class Snippet:
    """One fenced block. line: of its first line; word and about: of the comment before it."""

    page: Path
    line: int
    language: str
    text: str
    word: str | None = None
    about: str = ""

    @property
    def runner(self) -> str | None:
        """The test that runs it in its own way."""
        return self.about if self.word == "run by" else None

    @property
    def left(self) -> bool:
        """Whether nothing runs it here, for the reason given."""
        return self.word == "not run" or (self.word == "needs" and importlib.util.find_spec(self.about) is None)

    @property
    def runs(self) -> bool:
        """Whether `run` takes it."""
        return self.language in RUN and self.runner is None and not self.left

    @property
    def place(self) -> str:
        """Where to look when it fails."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def steps(self) -> list[tuple[str, list[str]]]:
        """Commands of a console block with the lines shown below each."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.strip():
                assert found, f"{self.place}: the block shows output before a command; begin commands with '$ '"
                found[-1][1].append(line)
        return found

    @property
    def count(self) -> int:
        """Commands of a console block; 1 for any other."""
        return len(self.steps) if self.language == "console" else 1


def pages() -> list[Path]:
    """Every page whose blocks are run or checked: what a reader is sent to first, then one page a command."""
    first = [ROOT / "docs" / "tutorial.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "index.md"]
    return first + [page for page in sorted((ROOT / "docs").glob("*.md")) if page not in first]


def snippets(page: Path) -> list[Snippet]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(
            page,
            text[: match.start("text")].count("\n") + 1,
            match["language"].strip(),
            match["text"],
            match["word"],
            match["about"] or "",
        )
        for match in FENCE.finditer(text)
    ]


def synopses(page: Path) -> list[str]:
    """The indented blocks of a page, outside lists and fences."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    blocks = re.findall(r"(?:^|\n)\n((?: {4}[^\n]*\n)+)", text)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]


def run(snippet: Snippet, names: dict[str, object]) -> str | None:
    """Run a block in the current folder; what went wrong, or None. names: what the page's Python blocks share."""
    if snippet.language == "python":
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                flags = __future__.annotations.compiler_flag
                exec(compile(snippet.text, snippet.place, "exec", flags, dont_inherit=True), names)
        except Exception:
            return f"{snippet.place}: {traceback.format_exc(limit=-2)}"
        return None
    steps = [*snippet.steps, ("", [])]
    for (command, shown), (after, codes) in pairwise(steps):
        if command == "echo $?":
            continue
        code, printed = _command(command)
        wanted = int(codes[0]) if after == "echo $?" else 0
        if code != wanted:
            return f"{snippet.place}: {command}: exit {code}, not {wanted}\n{printed}"
        if (missing := absent(shown, printed)) is not None:
            return f"{snippet.place}: {command} does not print\n{missing}\nbut\n{printed}"
    return None


def absent(shown: list[str], printed: str) -> str | None:
    """The first line shown that isn't printed in that order; None if all are.

    Numbers, units and frames don't count, `...` stands for any lines, and at the end of a line for its rest.
    """
    lines = iter([masked(line) for line in printed.splitlines()])
    wanted = [line for line in shown if line.strip() != "..." and masked(line)]
    return next((line for line in wanted if not any(_fits(masked(line), found) for found in lines)), None)


def _fits(shown: str, found: str) -> bool:
    return found.startswith(shown[:-3].rstrip()) if shown.endswith("...") else found == shown


def masked(line: str) -> str:
    """A line without what another text or machine changes."""
    plain = NUMBER.sub("#", DRAWN.sub(" ", line))
    return " ".join(re.sub(r"# [kMG]?B\b", "# B", plain).split())


def _command(command: str) -> tuple[int, str]:
    words = shlex.split(command)
    if words[0] != "assay":
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main.main(words[1:])
        except SystemExit as end:
            return int(end.code or 0), printed.getvalue()
    raise AssertionError("the command did not exit")
