"""The tensors of a model with the edits made to them so far; a tensor is read, and its edits run, when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.model.checkpoint import Checkpoint
from assay.model.streams import Face

Edit = Callable[[Tensor], Tensor]
"""Takes one whole tensor, in memory of its own, and returns what it becomes; may work in place."""


class Weights:
    """Immutable: `edited` returns a new object, and what an edit reads from an older one stays as it was there."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.config: Mapping[str, Any] = source.config
        self._parent: Weights | None = None
        self._edits: Mapping[str, Edit] = {}
        self._copies: Mapping[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        before = self.source.names if self._parent is None else self._parent.names
        return sorted({*before, *self._copies})

    def read(self, name: str) -> Tensor:
        """A tensor with all edits, float32 (float64 where it is stored so), in memory of its own."""
        if self._parent is None:
            tensor = self.source.read(name)
            return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
        tensor = self._parent.read(self._copies.get(name, name))
        return self._edits[name](tensor) if name in self._edits else tensor

    def width(self, face: Face) -> int:
        """How many channels a face has."""
        return face.width(self.source.shape(self.origin(face.tensor)))

    def origin(self, name: str) -> str:
        """The stored tensor that `name` is, or is a changed copy of."""
        return name if self._parent is None else self._parent.origin(self._copies.get(name, name))

    def untouched(self, name: str) -> bool:
        """Whether no edit changes this tensor."""
        if self._parent is None:
            return True
        return name not in self._edits and self._parent.untouched(self._copies.get(name, name))

    def edited(self, edits: Mapping[str, Edit], copies: Mapping[str, str] | None = None, **config: Any) -> Weights:
        """These weights with further edits, new copies (new name -> old name), and changed keys of the config."""
        later = Weights(self.source)
        later._parent, later._edits, later._copies = self, dict(edits), dict(copies or {})
        later.config = {**self.config, **config}
        return later


class Edits:
    """Collects changes of faces into one edit a tensor."""

    def __init__(self) -> None:
        self._found: dict[str, list[Edit]] = {}

    def add(self, faces: Iterable[Face], change: Edit) -> None:
        """`change` maps every face [..., width] to its new values of the same shape. A face given twice is changed once."""
        for face in dict.fromkeys(faces):
            self.whole(face.tensor, lambda tensor, face=face: face.changed(tensor, change))  # type: ignore[misc]

    def whole(self, name: str, edit: Edit) -> None:
        """`edit` maps the whole tensor."""
        self._found.setdefault(name, []).append(edit)

    def by_tensor(self) -> dict[str, Edit]:
        """The edits, by name of tensor, in the order in which they were added."""
        return {name: _chain(tuple(edits)) for name, edits in self._found.items()}


def _chain(edits: tuple[Edit, ...]) -> Edit:
    def run(tensor: Tensor) -> Tensor:
        for edit in edits:
            tensor = edit(tensor)
        return tensor

    return run
