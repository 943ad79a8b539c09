"""What profile.json holds, and that its parts belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, with_config
from typing_extensions import NotRequired, TypedDict

from assay.model.errors import InputError
from assay.model.schema import Calibration, Count, Finite, Shape, Size, conform

Nats = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Layer = Annotated[int, Field(ge=0, le=1 << 20)]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,7}$")]


class Taken(TypedDict):
    """Gradients, where less than all of them was measured: see `profile.Gradients`."""

    every: Size
    whole: bool


class Settings(TypedDict):
    """What a second call must ask for to continue, or to find, this profile."""

    model: str
    digest: str
    tokens: Size
    seed: int
    weightwise: list[str]
    token_weights: str
    target: str | None
    gradients: NotRequired[Taken]


@with_config({"extra": "forbid"})
class Row(TypedDict):
    """A site, as planning sees it: the fields of `SiteRow`."""

    name: str
    role: str
    block: Layer | None
    shape: Shape
    stored_bytes: Count
    scale_itemsize: Annotated[int, Field(ge=1, le=8)]
    transposed: bool
    expert: Layer | None


@with_config({"extra": "forbid"})
class Cached(TypedDict):
    """What one layer keeps of a token, elements and bytes."""

    keys: Count
    values: Count
    window: Count | None
    state: Count


@with_config({"extra": "forbid"})
class Needs(TypedDict):
    """Memory of serving: see `Footprint`."""

    layers: list[Cached]
    hidden: Count
    intermediate: Count
    vocabulary: Count
    latent: Count | None
    context: Count | None
    unknown: str


class Target(TypedDict):
    """The comparison with the user's own text."""

    text: str
    extra_loss: Finite
    warning: str | None


class Index(TypedDict):
    """profile.json, checksum and version aside."""

    settings: Settings
    model: str
    family: str
    tokenizer: str
    calibration: Calibration
    held_out: Annotated[list[Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]], Field(min_length=1)]
    rows: Annotated[list[Row], Field(min_length=1)]
    kept: dict[str, str]
    names: dict[str, Count]
    footprint: Needs
    parameters: Size | Count
    file_bytes: Count
    gguf: dict[str, str | Count]
    prices: dict[str, dict[str, dict[str, Nats]]]
    ratios: dict[str, Annotated[dict[Number, Annotated[dict[Number, Nats], Field(min_length=1)]], Field(min_length=1)]]
    probes: list[Annotated[list[Nats], Field(min_length=2, max_length=2)]]
    first: Annotated[float, Field(gt=0, le=10)]
    spread: dict[str, Annotated[list[Finite], Field(min_length=1, max_length=64)]]
    probe_spread: Annotated[float, Field(ge=0, le=10)]
    target: Target | None
    flat: NotRequired[bool]
    version: NotRequired[int]


def check(index: Mapping[str, Any], where: str) -> None:
    """Raises InputError for anything that `profiling` does not write."""
    problem = f"{where}: not a profile, or a damaged one"
    conform(index, Index, problem)
    rows = index["rows"]
    if len({row["name"] for row in rows}) < len(rows):
        raise InputError(f"{problem} (a site is there twice)")
    if len({len(window) for window in index["held_out"]}) > 1:
        raise InputError(f"{problem} (windows of different lengths)")
    inside = [row["name"] for row in rows if row["block"] is not None]
    known = {len(index["spread"][name]) for name in inside if name in index["spread"]}
    if len(known) > 1:
        raise InputError(f"{problem} (spreads over different numbers of parts)")
    if not all("nearest" in prices for levels in index["prices"].values() for prices in levels.values()):
        raise InputError(f"{problem} (a level without the price of rounding to nearest)")
    if index["parameters"] < 1 or not sum(index["names"].values()):
        raise InputError(f"{problem} (a model without parameters)")
    if "refused" not in index["gguf"] and not all(isinstance(index["gguf"].get(k), int) for k in ("file_bytes", "tensor_bytes")):
        raise InputError(f"{problem} (gguf: neither sizes nor a reason)")
