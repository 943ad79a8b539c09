"""Bytes: what a budget leaves for the decisions of a plan, beside what no decision changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from assay.budget import serving
from assay.budget.caches import CacheChoice
from assay.budget.menu import Decision
from assay.budget.size import Budget, parse_size
from assay.engines.contract import Contract
from assay.engines.gguf.write import whole_bytes
from assay.measure.footprint import Footprint
from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel
from assay.model.errors import InputError

HEADER_PER_SITE = 420
ALIGNMENT = 32
"""Of the tensors in a GGUF file, whose headers are as long for any level."""


def stored(model: StreamedModel, contract: Contract) -> tuple[int, int]:
    """Bytes of the files and of the tensors in them if every tensor stays. Raises InputError where there are none."""
    checkpoint = model.checkpoint
    if contract.layout == "gguf":
        return whole_bytes(checkpoint)
    return checkpoint.kept_file_bytes, sum(checkpoint.kept_nbytes(name) for name in checkpoint.names)


def limit(
    budget: Budget, contract: Contract, options: Sequence[Decision], whole: tuple[int, int], needs: Footprint,
    cache: CacheChoice | None = None,
) -> int:  # fmt: skip
    """Bytes that the decisions may take together. whole: see `stored`; cache: a planned one."""
    if budget.memory is None:
        return budget.limit_for(options, fixed(whole[0], options, contract))
    assert budget.load is not None, "a budget of memory says for what"
    total = parse_size(budget.memory)
    beside = total - serving.room(needs, budget.load, contract.name, total, cache)
    return budget.limit_for(options, whole[1] - sum(d.options[-1].nbytes for d in options), beside)


def limit_of(
    profile: Profile, budget: Budget, contract: Contract, options: Sequence[Decision], cache: CacheChoice | None = None
) -> int:
    """`limit` for the model that was profiled."""
    needs = needs_of(profile) if budget.memory is not None else Footprint((), 0, 0, 0, None, None)
    return limit(budget, contract, options, whole_of(profile, contract), needs, cache)


def needs_of(profile: Profile) -> Footprint:
    """What serving the model that was profiled takes. Raises InputError where the profile doesn't say."""
    return Footprint.from_json(profile.index.get("footprint"))


def rooms(
    profile: Profile, budget: Budget, contract: Contract, costed: Sequence[Decision], offered: Sequence[CacheChoice | None]
) -> Callable[[CacheChoice | None], int]:
    """Bytes that a cache leaves for the decisions. Raises InputError with the range where even the smallest leaves too few."""
    needs, load = needs_of(profile), budget.load
    assert load is not None
    beside = {id(c): sum(serving.overheads(needs, load, contract.name, c).values()) for c in offered}
    least = min(offered, key=lambda c: beside[id(c)])
    limit = limit_of(profile, budget, contract, costed, least)
    return lambda c: limit + beside[id(least)] - beside[id(c)]


def whole_of(profile: Profile, contract: Contract) -> tuple[int, int]:
    """`stored` of the model that was profiled. Raises InputError where there is no such file."""
    if contract.layout != "gguf":
        return int(profile.index["file_bytes"]), sum(profile.index["names"].values())
    found = profile.index.get("gguf", {"refused": f"{profile.folder} says nothing about GGUF; run assay profile again"})
    if "refused" in found:
        raise InputError(found["refused"])
    return int(found["file_bytes"]), int(found["tensor_bytes"])


def fixed(file_bytes: int, options: Sequence[Decision], contract: Contract) -> int:
    """File bytes that no decision changes: kept tensors, headers, and room for the longer headers to come."""
    decided = sum(d.options[-1].nbytes for d in options)
    if contract.layout == "gguf":
        return file_bytes - decided + ALIGNMENT * sum(len(d.sites) for d in options)
    names = sum(len(site) for d in options for site in d.sites)
    return file_bytes - decided + HEADER_PER_SITE * sum(len(d.sites) for d in options) + 4 * names
