"""A result, or any compressed checkpoint, in another layout: the same weights exactly, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from assay.engines import get, reopen, write
from assay.engines.contract import Contract
from assay.engines.fused import share_units, siblings
from assay.engines.gguf import reopen as gguf_reopen
from assay.engines.gguf import write as gguf_write
from assay.engines.gguf.exact import as_blocks
from assay.engines.layout import LAYOUTS
from assay.model import sums
from assay.model.checkpoint import Checkpoint
from assay.model.errors import InputError, ShortfallError
from assay.model.folder import INDEX
from assay.model.level import Level
from assay.model.notes import read_recipe
from assay.model.packed import Packed, PackedInteger
from assay.model.sites import Anatomy, survey

TARGETS: Mapping[str, tuple[str, ...]] = {
    "plain": ("plain",), "assay": ("assay",), "awq": ("awq",), "gptq": ("gptq", "gptq-v2"),
    "compressed-tensors": ("vllm", "transformers"), "gguf": ("llama.cpp",),
}  # fmt: skip
"""Engines by what people call their layout; the first whose contract holds everything is written for."""
RECIPE = "assay/recipe.json"
EXAMPLES = 3


def convert(folder: Path, to: str, destination: Path) -> Contract:
    """Write a compressed checkpoint in another layout; what is in that layout already is copied. Returns what it was
    written for.

    Every weight is read back and must be what it was. Raises InputError, naming the weights and what would change, where
    the layout can't hold them, and for a name that is no layout.
    """
    if to not in TARGETS:
        raise InputError(f"unknown layout {to!r}; there are {', '.join(sorted(TARGETS))}, and of a profile imatrix")
    source = Checkpoint.open(folder)
    sums.check(source.folder)
    if source.method == to:
        _copy(source, destination)
        return get(TARGETS[to][0])
    if to == "gguf":
        return _to_gguf(source, destination)
    if not source.levels and to != "plain":
        raise InputError(f"{folder} holds no compressed weights that assay can move; compress it with assay compress")
    contract, levels = _holder(source, to)
    turned = frozenset(name for name in levels if source.turned(name))
    ordered = frozenset(name for name in levels if to != "plain" and _scattered(source, name))
    packed: Mapping[str, Callable[[], Packed]] = {n: partial(_at, source, n, level) for n, level in levels.items()}
    packed = share_units(packed, levels) if contract.fused else packed
    write.write(destination, source, packed, contract, _recipe(source, contract), levels, turned, ordered=ordered)
    try:
        reopen.compare(destination, source, packed, contract, turned)
        _same_weights(source, destination)
    except ShortfallError:
        shutil.rmtree(destination)
        raise
    return contract


def _copy(source: Checkpoint, destination: Path) -> None:
    """The files that belong to a checkpoint; a GGUF file may lie in a folder of anything."""
    write.check_space(destination.absolute().parent, source.weight_bytes)
    named = [path for name in (INDEX, "config.json") if (path := source.folder / name).exists()]
    with write.new_folder(destination) as made:
        for path in {*source.side_files(), *named, *(info.shard for info in source.stored.values())}:
            target = made / path.relative_to(source.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _to_gguf(source: Checkpoint, destination: Path) -> Contract:
    """Float weights as they are, compressed ones with the same codes and scales."""
    contract = get("llama.cpp")
    blocks, levels = as_blocks({name: partial(source.read_packed, name) for name in source.levels})
    loaders = {name: partial(blocks.__getitem__, name) for name in blocks}
    gguf_write.write(destination, source, loaders, contract, _recipe(source, contract), levels)
    try:
        gguf_reopen.compare(destination, source, loaders, contract)
    except ShortfallError:
        shutil.rmtree(destination)
        raise
    return contract


def _holder(source: Checkpoint, to: str) -> tuple[Contract, Mapping[str, Level]]:
    """The first engine of a layout that holds all weights, and the level that each has there. Raises InputError."""
    if to == "plain":
        return get("plain"), source.levels
    anatomy = survey(source)
    problems: list[tuple[int, str]] = []
    for name in TARGETS[to]:
        contract = get(name)
        levels = {n: _level_in(contract, level) for n, level in source.levels.items()}
        refused = _refused(source, contract, levels, anatomy)
        if not refused:
            return contract, levels
        problems.append((len(refused), _sentence(contract, levels, refused)))
    raise InputError(min(problems)[1])


def _level_in(contract: Contract, level: Level) -> Level:
    """A level as the layout names it: layouts that always store zero points store those of symmetric levels too."""
    zeros = contract.symmetric == (False,) and level.format == "int" and level.symmetric
    return replace(level, symmetric=False) if zeros else level


def _at(source: Checkpoint, name: str, level: Level) -> Packed:
    weight = source.read_packed(name)
    return replace(weight, level=level) if isinstance(weight, PackedInteger) else weight


def _refused(source: Checkpoint, contract: Contract, levels: Mapping[str, Level], anatomy: Anatomy) -> dict[str, str]:
    """Why weights can't be held, by name."""
    found: dict[str, str] = {}
    whole = contract.refusal(anatomy.family, anatomy.has_experts)
    for name, level in levels.items():
        rows, columns = source.shape(name)[:: -1 if source.turned(name) else 1]
        site = anatomy.sites.get(name)
        role, expert = (site.role, site.expert) if site else ("", None)
        reason = whole or contract.refuses(role, (rows, columns), source.turned(name), expert, name)
        if reason is None and not contract.takes(level, columns, expert is not None, rows):
            reason = f"{contract.name} has no {level.name}"
        if reason is None and not LAYOUTS[contract.layout].ordered and _scattered(source, name):
            reason = f"{contract.name} wants neighbouring inputs in a group"
        if reason:
            found[name] = reason
    if contract.one_level and len(set(levels.values())) > 1:
        found |= {n: f"{contract.name} holds one level for all" for n in levels if n not in found}
    experts: dict[int | None, list[str]] = {}
    for site in anatomy.sites.values():
        if site.expert is not None:
            experts.setdefault(site.block, []).append(site.name)
    joined = [*siblings(source.names), *experts.values()] if contract.fused else []
    for group in joined:
        if len({levels.get(n) for n in group}) > 1:
            found |= {n: "loaded as one matrix, which has one level" for n in group if n in levels and n not in found}
    return found


def _sentence(contract: Contract, levels: Mapping[str, Level], refused: Mapping[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted(refused.items()):
        reasons.setdefault(reason, []).append(f"{name.removesuffix('.weight')} ({levels[name].name})")
    parts = []
    for reason, names in reasons.items():
        more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
        parts.append(f"{', '.join(names[:EXAMPLES])}{more}: {reason}")
    change = f"{len(refused)} of {len(levels)} weights would have to be rounded anew"
    return f"{change}: {'; '.join(parts)}; use --to plain, or compress the original with --engine {contract.name}"


def _scattered(source: Checkpoint, name: str) -> bool:
    """Whether the groups of a weight are not neighbouring inputs."""
    stored = source.packed[name].parts
    part = next((stored[suffix] for suffix in ("g_idx", "weight_g_idx") if suffix in stored), None)
    if part is None:
        return False
    (groups,) = (tensor for _, tensor in source.iter_raw([part]))
    return bool((groups.diff() < 0).any())


def _recipe(source: Checkpoint, contract: Contract) -> dict[str, str]:
    """What the source's recipe promised holds of the same weights; its damage belongs to the bytes of the source."""
    found = read_recipe(source.folder)
    if found is None:
        return {}
    recipe = {key: value for key, value in found.items() if key != "damage"} | {"engine": contract.name}
    return {RECIPE: json.dumps(recipe, indent=1, sort_keys=True) + "\n"}


def _same_weights(source: Checkpoint, destination: Path) -> None:
    written = Checkpoint.open(destination)
    for name in source.names:
        found, meant = written.read(name), source.read(name)
        if found.shape != meant.shape or not torch.equal(found.to(meant.dtype), meant):
            raise ShortfallError(f"{destination}: {name} would not be what it was; nothing was written")
