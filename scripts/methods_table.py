"""Writes the table of all methods into docs/methods.md.

PYTHONPATH=src python scripts/methods_table.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import assay
from assay.model.ggml import KINDS
from assay.model.level import Level

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
HEADING = "## All methods\n"
WHOLE_JOB = ("test_job.py", "test_terms.py")
ENGINES = ROOT / "tests" / "engines"
HEADER = ("method", "verb", "needs", "formats", "levels offered to a plan", "paper", "checked by")


def page(text: str) -> str:
    """The page with its table made anew."""
    head = text.partition(HEADING)[0]
    return f"{head}{HEADING}\nMade by `scripts/methods_table.py`; levels are those for rows of 256 weights.\n\n{table()}\n"


def table() -> str:
    """Every method with its facts, as markdown."""
    found = (p for p in sorted((ROOT / "tests").rglob("test_*.py")) if p.name not in WHOLE_JOB and p.parent != ENGINES)
    tests = {p: p.read_text(encoding="utf-8") for p in found}
    lines = [HEADER, ["---"] * len(HEADER), *(_cells(m, tests) for m in assay.list_methods())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(method: dict[str, Any], tests: dict[Path, str]) -> list[str]:
    levels = [Level.parse(name) for name in method.get("levels", ())]
    return [
        f"`{method['name']}`", method["verb"], ", ".join(method["needs"]) or "-", _formats(method.get("formats", ())) or "-",
        summary(levels) or "-", method["paper"], f"`{checked_by(method['name'], tests).relative_to(ROOT).as_posix()}`",
    ]  # fmt: skip


def _formats(names: Sequence[str]) -> str:
    """In one word what llama.cpp has many of."""
    return ", ".join([n for n in names if n not in KINDS] + (["blocks"] if set(names) & KINDS.keys() else []))


def checked_by(name: str, tests: dict[Path, str]) -> Path:
    """The test file of a method's own name, else the one that names it most often."""
    return max(tests, key=lambda p: (p.stem == f"test_{name}", tests[p].count(f'"{name}"')))


def summary(levels: Sequence[Level]) -> str:
    """What differs among levels: widths, groups, and what is stored beside the codes."""
    if not levels:
        return ""
    found = {x.format: ", ".join(f"{b:g}" for b in _distinct(y.bits for y in levels if y.format == x.format)) for x in levels}
    groups = _distinct(x.group_size or 1 << 30 for x in levels)
    sizes = ", ".join("row" if g == 1 << 30 else f"{g:g}" for g in groups)
    beside = [f"{x.sparse:.2%} exact" for x in levels if x.sparse] + [f"rank {x.rank}" for x in levels if x.rank]
    extra = list(dict.fromkeys(beside))
    plain = " or nothing" if extra and any(x == x.base for x in levels) else ""
    return f"{'; '.join(f'{n} {b} bits' for n, b in found.items())}; groups: {sizes}" + (
        f"; with {', '.join(extra)}{plain}" if extra else ""
    )


def _distinct(values: Iterable[float]) -> list[float]:
    return sorted(set(values))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
