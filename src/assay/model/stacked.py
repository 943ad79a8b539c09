"""Experts that a file stores as one 3-D tensor, as the matrices of single experts that every other file and engine has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from assay.model.arch import facts
from assay.model.stored import TensorInfo


def apart(config: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, stacked experts taken apart under the names that the family's own files have.

    A stack [experts, out, in] holds the matrices of one role, or of several one after another along `out` (gate and up).
    Families that aren't known to store single experts in this order are left as they are. config: of the model.
    """
    family = str(config.get("model_type"))
    table = facts()
    if family not in table["apart"] or not any(_is_stack(n, i) for n, i in stored.items()):
        return dict(stored)
    own = table["families"].get(family, {})
    patterns = own.get("experts") or table["families"]["*"]["experts"]
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        suffix = next((s for s in patterns if name.endswith(s)), None) if _is_stack(name, info) else None
        if suffix is not None and info.shape[1] % len(patterns[suffix]):
            suffix = None
        if suffix is None:
            found[_renamed(name, own.get("rename", {}))] = _whole(name, info, own.get("rename", {}))
        else:
            found |= dict(_experts(info, name.removesuffix(suffix), patterns[suffix]))
    return found


def _is_stack(name: str, info: TensorInfo) -> bool:
    floats = info.dtype.is_floating_point and info.dtype.itemsize >= 2
    return info.read is None and floats and len(info.shape) == 3 and ".experts." in name


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for new, old in rules.items():
        name = name.replace(new, old, 1)
    return name


def _whole(name: str, info: TensorInfo, rules: Mapping[str, str]) -> TensorInfo:
    """A tensor that stays as it is, perhaps under another name."""
    return replace(info, renamed=_renamed(name, rules) != name)


def _experts(info: TensorInfo, head: str, patterns: list[str]) -> Iterator[tuple[str, TensorInfo]]:
    """Each matrix is a run of whole rows, so its bytes lie together."""
    experts, rows, columns = info.shape
    step = rows // len(patterns)
    nbytes = step * columns * info.dtype.itemsize
    for index in range(experts * len(patterns)):
        name = head + patterns[index % len(patterns)].format(e=index // len(patterns))
        yield name, replace(info, shape=(step, columns), nbytes=nbytes, start=info.start + index * nbytes, renamed=True)
