"""The ledger: what became of every tensor of the source, with bytes that add up to the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from assay.model.schema import Count

Fate = Literal["done", "fell_back", "copied", "dropped"]


@dataclass(frozen=True)
class Entry:
    """One source tensor: the level planned for it (None = keep) and what happened."""

    tensor: str
    planned: str | None
    fate: Fate
    reason: str
    bytes_before: Count
    bytes_after: Count


class Ledger:
    """Entries by tensor name; every tensor of the source exactly once."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: dict[str, Entry] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        if entry.tensor in self.entries:
            raise ValueError(f"{entry.tensor} is in the ledger twice")
        self.entries[entry.tensor] = entry

    def counts(self) -> dict[str, int]:
        """Number of tensors planned, done, fallen back, copied and dropped."""
        fates = Counter(e.fate for e in self.entries.values())
        planned = sum(e.planned is not None for e in self.entries.values())
        return {"planned": planned} | {f: fates[f] for f in ("done", "fell_back", "copied", "dropped")}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data after compression."""
        return sum(e.bytes_after for e in self.entries.values())

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(self.entries[name]) for name in sorted(self.entries)]
