"""What the report shows, read from a result's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assay.budget.plan import Plan
from assay.model import sums
from assay.model.errors import InputError
from assay.model.ledger import Entry
from assay.model.notes import DAMAGED, read_ledger, read_recipe, read_rows, read_verdict
from assay.model.schema import Count, Finite, Size

OUTSIDE = "outside"


@dataclass(frozen=True)
class Row:
    """One weight matrix of the plan; damage: predicted, nats per token."""

    site: str
    block: int | None
    role: str
    weights: Size
    level: str
    before: Count
    after: Count
    damage: Finite
    why: str


@dataclass(frozen=True)
class Facts:
    """Everything about one result. verdict: None before `assay verify`; licence: name of the file with it."""

    plan: Plan
    recipe: Mapping[str, Any]
    ledger: Sequence[Entry]
    rows: Sequence[Row]
    verdict: Mapping[str, Any] | None
    licence: str | None

    @property
    def before(self) -> int:
        """Bytes of the original's tensors."""
        return sum(e.bytes_before for e in self.ledger)

    @property
    def after(self) -> int:
        """Bytes of the result's tensors."""
        return sum(e.bytes_after for e in self.ledger)


def read(folder: str | Path) -> Facts:
    """The facts of a result. Raises InputError where `assay/` is missing or damaged."""
    root = Path(folder)
    notes = root / "assay"
    if not notes.is_dir():
        raise InputError(f"{root}: no assay/ folder; give a folder that assay compress wrote")
    recipe = read_recipe(root)
    if recipe is None:
        raise InputError(f"{notes}: {DAMAGED} (recipe.json is missing)")
    ledger = list(read_ledger(root).entries.values())
    rows = [Row(**row) for row in read_rows(notes / "sites.json", Row)]
    sums.check(root, notes_only=True)
    licence = next((p.name for p in sorted(root.iterdir()) if p.name.lower().startswith(("licen", "copying"))), None)
    return Facts(
        Plan.load(notes / "plan.yaml"), recipe, ledger, rows, read_verdict(root), licence,
    )  # fmt: skip


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What `assay/sites.json` holds."""
    return [asdict(row) for row in rows]


def cells(rows: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], dict[str, Any]]]:
    """(blocks, roles, cells) of the map: matrices of one role in one block, experts say, are one cell."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((OUTSIDE if row.block is None else str(row.block), row.role), []).append(row)
    blocks = sorted({block for block, _ in together}, key=lambda b: (b == OUTSIDE, int(b) if b != OUTSIDE else 0))
    return blocks, list(dict.fromkeys(role for _, role in together)), {k: _cell(*k, v) for k, v in together.items()}


def _cell(block: str, role: str, rows: Sequence[Row]) -> dict[str, Any]:
    levels = Counter(row.level for row in rows)
    named = ", ".join(level if n == len(rows) == 1 else f"{n} x {level}" for level, n in sorted(levels.items()))
    where = f"{role} outside the blocks" if block == OUTSIDE else f"block {block}, {role}"
    after = sum(row.after for row in rows)
    return {
        "name": where, "levels": named, "bits": 8 * after / sum(row.weights for row in rows), "bytes": after,
        "before": sum(row.before for row in rows), "damage": sum(row.damage for row in rows),
        "why": "; ".join(dict.fromkeys(row.why for row in rows)) if len(rows) < 3 else "",
    }  # fmt: skip
