"""Statistics of the sites of one block, as they lie in a profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.measure.damage import Curvature
from assay.model.errors import InputError
from assay.model.files import Tensors, damaged, open_tensors
from assay.model.finite import finite

EMPTY = "none"
PART = "part|"
LARGEST = "largest|"


class Curvatures(Mapping[str, Curvature]):
    """Statistics on disk as averages per token, read one site at a time.

    total: calibration tokens; weightwise: which of `WEIGHTWISE` to read as well, where they were measured; shapes: [out, in]
    of the sites, where they are known. Raises InputError for files that are damaged or of another model.
    """

    def __init__(
        self, folder: Path, block: int | None, total: int, weightwise: Sequence[str] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:  # fmt: skip
        name = block_name(block)
        files = {kind: folder / f"{name}.{kind}.safetensors" for kind in weightwise}
        self._weightwise = {kind: path for kind, path in files.items() if path.exists()}
        self._inputs, self._gradients = (folder / f"{name}.{part}.safetensors" for part in ("H", "G"))
        self._total, self._shapes = total, shapes or {}
        with open_tensors(self._gradients) as file:
            keys = [key for key in file if key != EMPTY and not key.startswith(PART) and "|" in key]
        self._keys = dict(key.split("|", 1) for key in keys)

    def reads(self, site: str) -> str:
        """Key of what a site reads: sites with one key have one H."""
        if site not in self._keys:
            raise damaged(self._gradients, f"it lacks {site}")
        return self._keys[site]

    def tokens(self, site: str) -> int:
        """How many tokens met a site."""
        with open_tensors(self._inputs) as file:
            return self._seen(file, self.reads(site))

    def largest(self, site: str) -> Tensor:
        """Largest magnitude among the inputs of a site, float32 []. Raises InputError for a profile that lacks it."""
        return self._largest(self.reads(site))

    def largest_cached(self) -> tuple[Tensor, Tensor] | None:
        """The same of the keys and of the values of a block, as they are cached; None for a block that caches none."""
        with open_tensors(self._inputs) as file:
            known = f"{LARGEST}keys" in file
        return (self._largest("keys"), self._largest("values")) if known else None

    def _largest(self, key: str) -> Tensor:
        with open_tensors(self._inputs) as file:
            if f"{LARGEST}{key}" not in file:
                raise InputError(f"{self._inputs.parent} does not say how large inputs are; run assay profile again")
            found = file[f"{LARGEST}{key}"].clone()
        if found.numel() != 1 or not 0 <= float(found) < torch.inf:
            raise damaged(self._inputs, f"{LARGEST}{key} is no magnitude")
        return found.float().reshape(())

    def __getitem__(self, site: str) -> Curvature:
        reads, (rows, columns) = self.reads(site), self._shapes.get(site, (None, None))
        with open_tensors(self._inputs) as file:
            seen = self._seen(file, reads)
            h = _moment(self._inputs, file, reads, columns) / max(seen, 1)
            parts = _parts(self._inputs, file, reads, len(h))
        with open_tensors(self._gradients) as file:
            g = _moment(self._gradients, file, f"{site}|{reads}", rows) / max(seen, 1)
            outputs = _parts(self._gradients, file, f"{site}|{reads}", len(g))
        more: dict[str, Any] = {}
        if parts and outputs:
            if len(parts[0]) != len(outputs[0]):
                raise damaged(self._gradients, f"other parts of the text than in {self._inputs.name}")
            met = (parts[0] > 0) & (outputs[0] > 0)
            (n, x), (m, y) = ((counts[met], squares[met]) for counts, squares in (parts, outputs))
            more["parts"] = (n, x / n[:, None], y / m[:, None])
        for kind, path in self._weightwise.items():
            with open_tensors(path) as file:
                more[kind] = file[site].clone()
            if more[kind].shape != (len(g), len(h)):
                raise damaged(path, f"{site} is {list(more[kind].shape)}")
        return Curvature(h, g, seen / self._total, seen, **more)

    def __contains__(self, site: object) -> bool:
        return site in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _seen(self, file: Tensors, reads: str) -> int:
        count = file[f"n|{reads}"]
        if count.numel() != 1 or not 0 <= float(count) < 1 << 53:
            raise damaged(self._inputs, f"n|{reads} is no count")
        return int(count)


def block_name(block: int | None) -> str:
    """How the files of a block, or of what lies outside them, begin."""
    return "outside" if block is None else f"block-{block:04d}"


def _moment(path: Path, file: Tensors, key: str, wanted: int | None) -> Tensor:
    """A second moment [n, n], or its diagonal [n]."""
    found = file[key]
    fits = found.ndim in (1, 2) and len(set(found.shape)) == 1 and wanted in (None, len(found))
    if not fits or found.dtype != torch.float32 or not finite(found):
        raise damaged(path, f"{key} is {list(found.shape)} {found.dtype} where finite float32 for {wanted or 'any'} is needed")
    return found


def _parts(path: Path, file: Tensors, key: str, wanted: int) -> tuple[Tensor, Tensor] | None:
    """Tokens of each part, 0 for one that no token is of, and the sums of squares over them; None where they weren't kept."""
    if f"{PART}{key}" not in file:
        return None
    counts, sums = file[f"{PART}n|{key}"], file[f"{PART}{key}"]
    if counts.ndim != 1 or sums.shape != (len(counts), wanted) or not (finite(sums) and finite(counts)):
        raise damaged(path, f"{PART}{key} is {list(sums.shape)} for {list(counts.shape)} parts")
    return counts, sums
