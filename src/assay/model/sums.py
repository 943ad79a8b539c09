"""Checksums of what a result holds, in the form of `sha256sum`, so that a bit that flips later shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

from assay.model.errors import InputError

SUMS = "assay/SHA256SUMS"
WEIGHTS = (".safetensors", ".gguf")
LATER = ("verdict.json", "report.html")
"""What is written into `assay/` after the result."""
BUFFER = 1 << 20


def write(folder: Path) -> None:
    """Note the sums of weights, indexes, config and of what lies in `assay/`, if a folder has that."""
    if (folder / "assay").is_dir():
        lines = [f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in _covered(folder)]
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
    found = {p.relative_to(folder).as_posix(): p for p in _covered(folder)}
    for name in sorted(set(wanted) | set(found)):
        if notes_only and not name.startswith("assay/"):
            continue
        if name not in found or name not in wanted or _sum(found[name]) != wanted[name]:
            raise InputError(f"{folder / name}: not as it was written; compress again, or remove {SUMS} if you changed it")


def _covered(folder: Path) -> list[Path]:
    """Files whose sums are noted, sorted."""
    beside = (p for p in folder.iterdir() if p.suffix in WEIGHTS or p.name.endswith(".index.json") or p.name == "config.json")
    notes = (p for p in (folder / "assay").iterdir() if p.name not in LATER and p != folder / SUMS and p.suffix != ".partial")
    return sorted(path for path in (*beside, *notes) if path.is_file())


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BUFFER):
            digest.update(block)
    return digest.hexdigest()
