"""Undo: which groups of a result to bring back to full precision first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay import engines
from assay.budget import menu, offers
from assay.engines.write import kept_nbytes
from assay.measure.stream import StreamedModel
from assay.model.notes import read_ledger

NAMED = 10
"""Groups that a verdict names."""


@dataclass(frozen=True)
class Restoration:
    """A group brought back: its tensors, the bytes that adds, and the damage it takes away (nats per token)."""

    tensors: tuple[str, ...]
    nbytes: int
    damage: float


def restorations(damage: Mapping[str, float], added: Mapping[str, int], groups: Iterable[Sequence[str]]) -> list[Restoration]:
    """Groups by falling damage per byte; any first few of them take away the most that so many bytes can.

    damage: of every compressed tensor, nats per token; added: bytes that full precision would add to it; groups:
    tensors that are compressed or kept together. Groups with nothing to bring back are left out.
    """
    found = []
    for group in groups:
        tensors = tuple(t for t in group if t in damage)
        nbytes, taken = sum(added[t] for t in tensors), sum(damage[t] for t in tensors)
        if nbytes > 0 and taken > 0:
            found.append(Restoration(tensors, nbytes, taken))
    return sorted(found, key=lambda r: (-r.damage / r.nbytes, r.tensors))


def suggestions(result: Path, original: StreamedModel, recipe: Mapping[str, Any], kl: float) -> list[dict[str, Any]]:
    """The first few restorations of a result folder, for its verdict.

    kl: measured, nats per token; a restoration is expected to take away its share of it. Empty for results whose
    files would not grow. Raises InputError for a damaged ledger.
    """
    damage, contract = recipe["damage"], engines.get(recipe["engine"])
    ledger = read_ledger(result).entries
    added = {
        name: kept_nbytes(original.checkpoint, name, contract) - ledger[name].bytes_after for name in damage if name in ledger
    }
    rows = offers.rows(original, original.checkpoint.kept_nbytes)
    groups = [
        [row.name for row in group if row.name in added]
        for group in menu.together(rows, contract.fused, contract.experts_by_role)
    ]
    total = sum(damage.values()) or 1.0
    return [
        {"tensors": list(r.tensors), "level": ledger[r.tensors[0]].planned, "bytes": r.nbytes, "damage": r.damage,
         "kl": kl * r.damage / total, "share": r.damage / total}
        for r in restorations(damage, added, groups)[:NAMED]
    ]  # fmt: skip
