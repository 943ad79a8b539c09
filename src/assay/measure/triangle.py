"""Symmetric matrices by their upper triangles, in strips: about half of the products."""

from __future__ import annotations

from torch import Tensor

STRIP = 1024


def strips(size: int) -> list[tuple[slice, slice]]:
    """Rows of each strip of a square matrix, and its columns, from the diagonal on."""
    return [(slice(start, start + STRIP), slice(start, size)) for start in range(0, size, STRIP)]


def mirror(moment: Tensor) -> None:
    """Fill what is below the strips of [n, n], in place."""
    for rows, _ in strips(len(moment)):
        moment[rows.stop :, rows] = moment[rows, rows.stop :].T
