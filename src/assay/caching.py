"""The cache of a plan as policies that can be attached: each layer's keys and values at a level of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from assay import engines
from assay.budget.caches import EXACT, Stored
from assay.budget.plan import Plan
from assay.engines.serving import server
from assay.methods import base
from assay.model.errors import InputError
from assay.runtime.codecs import Codec, GgmlBlocks, PerToken, Side
from assay.runtime.policy import Evictor, Packer

FOLDER = "cache"
Sides = tuple[Side | None, Side | None]


@dataclass(frozen=True)
class Flat:
    """One codec for keys and values, the latest `residual` tokens exact: what other engines do."""

    codec: Codec
    residual: int = 0
    stage: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()

    def sides(self, layer: int) -> Sides:
        """See `Packer`."""
        return Side((), self.codec, self.residual), Side((), self.codec, self.residual)


def levels() -> dict[str, Packer]:
    """What a layer of assay's own cache may be stored at, by name."""
    fp8, kivi, fireq, cskv = (base.load(name, FOLDER) for name in ("fp8", "kivi", "fireq", "cskv"))
    return {
        "fp8": fp8(), "kivi4": kivi(bits=4), "fireq4": fireq(bits=4), "cskv4": cskv(density=0.5, bits=4), "kivi2": kivi(bits=2)
    }  # fmt: skip


def engine_levels() -> dict[str, Packer]:
    """What other engines store, as policies: vLLM's fp8, llama.cpp's q8_0 and q4_0, transformers' int4 with quanto."""
    fp8 = base.load("fp8", FOLDER)
    return {
        "fp8": fp8(), "q8_0": Flat(GgmlBlocks(8)), "q4_0": Flat(GgmlBlocks(4)), "quanto4": Flat(PerToken(4, 64))
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Planned:
    """A packer for the keys and one for the values of each layer, None where they stay as they are."""

    layers: tuple[tuple[Packer | None, Packer | None], ...]
    stage: ClassVar[int] = 2

    @property
    def needs(self) -> tuple[str, ...]:
        """The union of what its packers need."""
        return ("calibration",) if any(_calibrates(p) for pair in self.layers for p in pair) else ()

    def calibrated(self, model: PreTrainedModel, ids: Tensor) -> Planned:
        """With those of its packers calibrated that need it; ids int [windows, tokens]."""
        fitted: dict[Any, Packer] = {}
        for packer in (p for pair in self.layers for p in pair):
            if packer is not None and _calibrates(packer) and id(packer) not in fitted:
                fitted[id(packer)] = packer.calibrated(model, ids)  # type: ignore[attr-defined]
        return replace(self, layers=tuple(tuple(fitted.get(id(p), p) for p in pair) for pair in self.layers))  # type: ignore[misc]

    def sides(self, layer: int) -> Sides:
        """See `Packer`."""
        keys, values = self.layers[layer]
        return keys.sides(layer)[0] if keys else None, values.sides(layer)[1] if values else None


def _calibrates(packer: Packer | None) -> bool:
    return packer is not None and "calibration" in getattr(packer, "needs", ())


def evictor(name: str, shares: Sequence[float]) -> Evictor:
    """A policy that keeps these shares of the tokens, one a layer."""
    made: Evictor = base.load(name, FOLDER)(budget=sum(shares) / len(shares), shape=tuple(shares))
    return made


def policies(layers: Sequence[Stored], evict: str | None, engine: str) -> list[Any]:
    """What to attach for a cache in an engine's types; other engines' types are simulated. Raises InputError."""
    by = server(engine)
    table = levels() if by.alike == "none" else engine_levels()
    prices = {c.name: c.price for c in by.caches}

    def packer(name: str) -> Packer | None:
        level = prices.get(name, name)
        if level != EXACT and level not in table:
            raise InputError(f"cache {name}: {engine} has {', '.join(dict.fromkeys([*prices, *table]))}")
        return table.get(level)

    made: list[Any] = []
    if evict is not None and any(one.share < 1 for one in layers):
        made.append(evictor(evict, [one.share for one in layers]))
    pairs = tuple((packer(one.keys), packer(one.values)) for one in layers)
    return [*made, Planned(pairs)] if any(p for pair in pairs for p in pair) else made


def planned_cache(source: str | Path | Plan) -> list[Any]:
    """Policies for `attach` from a plan, its file, or the folder of a result. Raises InputError where it plans no cache.

    with assay.attach(model, *assay.planned_cache("out")):
        model.generate(**inputs)
    """
    plan = source if isinstance(source, Plan) else Plan.load(_file(Path(source)))
    if not plan.cache:
        raise InputError("the plan states no cache; plan with --memory on a profile that was made with --cache")
    stated: Mapping[str, Any] = plan.cache
    made = policies([Stored.parse(line) for line in stated["layers"]], stated.get("evict"), engines.get(plan.engine).name)
    if not made:
        raise InputError("the plan leaves the cache as it is; there is nothing to attach")
    return made


def _file(path: Path) -> Path:
    return path / "assay" / "plan.yaml" if path.is_dir() else path
