"""Symmetric matrices by their upper triangles, in strips: about half of the products."""

from __future__ import annotations

from torch import Tensor

STRIP = 256


def strips(size: int) -> list[slice]:
    """Rows of each strip of a square matrix; its columns are those from its first row on."""
    return [slice(start, start + STRIP) for start in range(0, size, STRIP)]


def mirror(moment: Tensor) -> None:
    """Fill what is below the strips of [n, n], in place."""
    for rows in strips(len(moment)):
        moment[rows.stop :, rows] = moment[rows, rows.stop :].T
