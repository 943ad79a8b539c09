"""What the JSON of our own files must look like: checked when it is read, so that what follows may trust it."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from assay.model.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 31)]
Shape = Annotated[list[Size], Field(min_length=2, max_length=2)]


class Calibration(TypedDict):
    """The text of a profile. picked: windows of the pool, where a selection was made; pool: tokens of it."""

    source: str
    tokens: Size
    window: Size
    digest: str
    picked: list[Count]
    pool: Size
    select: str | None


def as_object(kind: type) -> Any:
    """The JSON object of a dataclass, with all of its fields and no others, as a kind for `conform`."""
    return with_config({"extra": "forbid"})(TypedDict(kind.__name__, get_type_hints(kind, include_extras=True)))  # type: ignore[operator]


def conform(value: Any, kind: Any, problem: str) -> None:
    """Raises InputError, `problem` and the first thing that differs from the type `kind`, for any other value.

    kind: of plain types, lists, mappings, typed dictionaries and dataclasses; no value is converted, so whole numbers are
    no texts and truths are no numbers.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        reason = " ".join(f"{place + ': ' if place else ''}{first['msg']}".split())
        raise InputError(f"{problem} ({reason})") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
