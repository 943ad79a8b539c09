"""How far prices move with the calibration text: the price of every site on each part of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from assay.budget.probe import probed_level
from assay.measure.curvatures import Curvatures
from assay.measure.damage import Curvature, diagonal
from assay.measure.stream import StreamedModel, read_weight
from assay.methods.grid.formats import grid_of

BITS = 3
"""Width at which the relative spread is taken; it hardly depends on it."""


def spreads(model: StreamedModel, folder: Path, total: int) -> dict[str, list[float]]:
    """For each site in the blocks: its price on each part of the calibration text over its price on all of it.

    A site that lacks a part that others have (an expert that no token of it met) is left out, and all are if the text has
    one part only.
    """
    found = {}
    for block in range(len(model.blocks)):
        curvatures = Curvatures(folder, block, total)
        for site in model.anatomy.block_sites(block):
            curvature = curvatures.get(site.name)
            if curvature is not None and curvature.parts is not None and len(curvature.parts[0]) > 1:
                found[site.name] = of_weight(read_weight(model, site), curvature)
    most = max(map(len, found.values()), default=0)
    return {name: values for name, values in found.items() if len(values) == most}


def of_weight(weight: Tensor, curvature: Curvature) -> list[float]:
    """`by_part` of rounding a weight [out, in] to nearest."""
    grid = grid_of(probed_level(weight.shape[1], BITS), torch.float32)
    return by_part(grid.squared_errors(weight, grid.fit(weight)), curvature).tolist()


def by_part(errors: Tensor, curvature: Curvature) -> Tensor:
    """The price on each part over the price on all, [parts]; their mean, weighted by tokens, is 1.

    errors: squared changes [out, in]. The price is g · errors · h with the diagonals of G and H, each a mean over
    the parts; a part counts with its first-order influence on it (infinitesimal jackknife; Jaeckel, 1972).
    """
    if curvature.parts is None:
        raise ValueError("the profile kept no parts")
    _, inputs, outputs = curvature.parts
    h, g = diagonal(curvature.h), diagonal(curvature.g)
    by_input, by_output = g @ errors, errors @ h
    whole = float(by_input @ h)
    if not whole > 0:
        return torch.ones(len(inputs))
    return (inputs @ by_input + outputs @ by_output) / whole - 1


def relative_error(parts: Mapping[str, list[float]], site: str) -> float | None:
    """Standard error of a site's price over the price, from `spreads`; None where it isn't known."""
    values = parts.get(site)
    if not values or len(values) < 2:
        return None
    return float(torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5)


def noise(parts: Mapping[str, list[float]], counts: Mapping[str, int]) -> float:
    """Half the variance, over the weights, of the prices' relative sampling errors, from `spreads`.

    What all prices of a part share is left out. `agreement.extra_loss` of two texts is so much larger by chance.
    """
    most = max(map(len, parts.values()), default=0)
    known = [n for n, values in parts.items() if len(values) == most]
    if most < 2:
        return 0.0
    values = torch.tensor([parts[n] for n in known], dtype=torch.float64)
    shares = torch.tensor([counts[n] for n in known], dtype=torch.float64)
    shares /= shares.sum()
    values = values - values.mean(1, keepdim=True)
    values -= shares @ values
    return float(0.5 * (shares @ values.square()).sum() / (most * (most - 1)))
