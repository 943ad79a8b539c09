"""What `assay/` in a result says about it: the recipe, the ledger and the verdict, checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from assay.model.errors import InputError
from assay.model.files import read_json, read_note
from assay.model.ledger import Entry, Ledger
from assay.model.schema import Calibration, Count, Finite, as_object, conform

TRANSFORM = "assay/transform.json"
DAMAGED = "not a result of assay compress, or a damaged one"


class Predicted(TypedDict):
    """KL in nats per token with its interval, and the bound that was asked for."""

    kl: Finite
    low: Finite
    high: Finite
    max_loss: Finite | None


class Prices(TypedDict):
    """See `Reference` of the budget."""

    prices: dict[str, Finite]
    noise: Finite
    source: str


class Side(TypedDict):
    """Bytes of all tensors and the KL in nats per token that is expected there."""

    bytes: Count
    bits: Finite
    predicted: Finite
    predicted_low: Finite
    predicted_high: Finite
    level: str | None


class Point(Side):
    """A size on the frontier: the best mix, and one level for all."""

    uniform: Side


class Recipe(TypedDict):
    """How a result was made."""

    model: str
    origin: NotRequired[str]
    calibration: Calibration
    predicted: Predicted
    bits: Finite
    bits_all: Finite
    method: str
    engine: str
    sequential: bool
    polish: dict[str, Any] | None
    seed: int
    reference: Prices
    damage: NotRequired[dict[str, Annotated[float, Field(ge=-1e12, le=1e12)]]]
    versions: dict[str, str]
    frontier: NotRequired[list[Point]]


class Measured(TypedDict):
    """KL in nats per token beside what was predicted."""

    measured: Finite
    low: Finite
    high: Finite
    median: Finite
    p99: Finite
    predicted: Finite | None
    predicted_low: Finite | None
    predicted_high: Finite | None


class Perplexity(TypedDict):
    """Before and after."""

    original: float
    compressed: float


class Verdict(TypedDict):
    """What verify found, as far as pages show it."""

    bytes: Count
    kl: Measured
    perplexity: Perplexity
    agreement: Finite
    text: str
    tokens: Count
    max_loss: Finite | None
    passed: bool


class Transformed(TypedDict):
    """The model that a checkpoint was transformed from, by its fingerprint, and the transforms, first to last."""

    source: str
    steps: list[dict[str, Any]]


def read_transform(folder: Path) -> dict[str, Any] | None:
    """How a checkpoint was transformed; None where it never was. Raises InputError for a damaged record."""
    path = folder / TRANSFORM
    return _read(path, Transformed) if path.exists() else None


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of a result; None where the folder holds none. Raises InputError for a damaged one."""
    path = folder / "assay" / "recipe.json"
    return _read(path, Recipe) if path.exists() else None


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """The same for the verdict."""
    path = folder / "assay" / "verdict.json"
    if not path.exists():
        return None
    verdict = read_note(path, DAMAGED)
    conform(verdict, Verdict, f"{path}: {DAMAGED}")
    if len({verdict["kl"][key] is None for key in ("predicted", "predicted_low", "predicted_high")}) > 1:
        raise InputError(f"{path}: {DAMAGED} (a prediction without its interval)")
    return verdict


def read_ledger(folder: Path) -> Ledger:
    """What became of every tensor. Raises InputError for a damaged ledger."""
    path = folder / "assay" / "ledger.json"
    try:
        return Ledger(Entry(**row) for row in read_rows(path, Entry))
    except ValueError as error:
        raise InputError(f"{path}: {DAMAGED} ({' '.join(str(error).split())})") from None


def read_rows(path: Path, kind: type) -> list[dict[str, Any]]:
    """A list of objects, each with the fields of a dataclass. Raises InputError."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {DAMAGED} ({' '.join(str(error).split())})") from None
    conform(rows, list[as_object(kind)], f"{path}: {DAMAGED}")  # type: ignore[misc]
    return rows


def _read(path: Path, kind: Any) -> dict[str, Any]:
    value: Mapping[str, Any] = read_json(path, DAMAGED)
    conform(value, kind, f"{path}: {DAMAGED}")
    return dict(value)
