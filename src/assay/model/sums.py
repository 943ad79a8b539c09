"""Checksums of what a result holds, in the form of `sha256sum`, so that a bit that flips later shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

from assay.model.errors import InputError

SUMS = "assay/SHA256SUMS"
WEIGHTS = (".safetensors", ".gguf", ".index.json")
LATER = (SUMS, "assay/verdict.json", "assay/report.html")
"""What is written after the result."""
EDITED = (".md", ".partial")
BUFFER = 1 << 20


def write(folder: Path) -> None:
    """Note the sums of every file but what people add to and what follows, if a folder has `assay/`."""
    if (folder / "assay").is_dir():
        lines = [f"{digest(folder / name)}  {name}\n" for name in _covered(folder)]
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check(folder: Path, notes_only: bool = False) -> None:
    """Raises InputError for a result that has changed since it was written; one without sums is believed.

    notes_only: only what lies in `assay/`.
    """
    path = folder / SUMS
    if not path.exists():
        return
    try:
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in path.read_text("utf-8").splitlines())}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); compress again") from None
    added = {name for name in _covered(folder) if name not in wanted and name.endswith(WEIGHTS)}
    for name in sorted(set(wanted) | added):
        if notes_only and not name.startswith("assay/"):
            continue
        if name in added or not (folder / name).is_file() or digest(folder / name) != wanted[name]:
            raise InputError(f"{folder / name}: not as it was written; compress again, or remove {SUMS} if you changed it")


def _covered(folder: Path) -> list[str]:
    """Files whose sums are noted, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in LATER and not name.endswith(EDITED) and not name.startswith("."))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BUFFER):
            found.update(block)
    return found.hexdigest()
