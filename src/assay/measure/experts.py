"""Experts that met too few tokens for their own statistics to mean much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from assay.measure.curvatures import Curvatures
from assay.measure.damage import Curvature
from assay.model.sites import Site

ENOUGH_TOKENS = 64
"""Of fewer, a second moment says more about these tokens than about the expert; set, not measured."""


def starved(curvature: Curvature) -> bool:
    """Whether a site that not every token meets met fewer than `ENOUGH_TOKENS`."""
    return curvature.share < 1 and curvature.tokens < ENOUGH_TOKENS


def reason(curvature: Curvature) -> str:
    """Why a starved site is rounded without its statistics, for the ledger."""
    if not curvature.tokens:
        return "no calibration token met it"
    return f"{curvature.tokens} calibration tokens met it, fewer than {ENOUGH_TOKENS}"


@dataclass(frozen=True)
class Typical:
    """What stands in for the statistics of starved experts: the mean of all experts of their layer and role.

    Its share is the mean share, so that an expert that the calibration text hardly used isn't taken for one without use.
    """

    curvatures: Mapping[tuple[int | None, str], Curvature]

    @classmethod
    def of(cls, curvatures: Curvatures, sites: Iterable[Site]) -> Typical:
        """Of those layers and roles that have a starved expert."""
        experts: dict[tuple[int | None, str], list[str]] = {}
        for site in sites:
            if site.expert is not None:
                experts.setdefault((site.block, site.role), []).append(site.name)
        found = {}
        for place, names in experts.items():
            counts = torch.tensor([float(curvatures.tokens(name)) for name in names])
            if bool((counts < ENOUGH_TOKENS).any()) and float(counts.sum()):
                found[place] = _mean(curvatures, names, counts)
        return cls(found)

    def standing_in(self, site: Site, curvature: Curvature) -> Curvature | None:
        """For a site: the stand-in of its starved statistics, None where its own will do or there is none."""
        return self.curvatures.get((site.block, site.role)) if site.expert is not None and starved(curvature) else None


def _mean(curvatures: Curvatures, names: list[str], counts: torch.Tensor) -> Curvature:
    weights = (counts / counts.sum()).tolist()
    first = curvatures[names[0]]
    h, g, share = torch.zeros_like(first.h), torch.zeros_like(first.g), 0.0
    for name, weight in zip(names, weights, strict=True):
        own = curvatures[name]
        h, g, share = h + weight * own.h, g + weight * own.g, share + own.share / len(names)
    return replace(first, h=h, g=g, share=share, tokens=int(counts.sum()), parts=None)
