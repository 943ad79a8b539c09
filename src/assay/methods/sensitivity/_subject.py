"""What a sensitivity is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from assay.measure.profile import Profile
from assay.measure.stream import StreamedModel, read_weight
from assay.methods.base import Method
from assay.methods.grid.formats import grid_of
from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.progress import Progress, Silent
from assay.model.sites import Site


@dataclass(frozen=True)
class Subject:
    """One profile, and its model where there is one.

    level_of: the level, for rows of so many weights, whose rounding to nearest is judged.
    """

    profile: Profile
    level_of: Callable[[int], Level]
    opened: StreamedModel | None = None
    seed: int = 0
    progress: Progress = field(default_factory=Silent)

    @property
    def model(self) -> StreamedModel:
        """Raises InputError where none was given."""
        if self.opened is None:
            raise InputError("this sensitivity runs the model itself; give it with --model")
        return self.opened

    @property
    def ids(self) -> Tensor:
        """Windows of the calibration text that no statistic was made from, int64 [windows, length]."""
        return torch.tensor(self.profile.index["held_out"])

    @property
    def sites(self) -> list[Site]:
        """Every site in the blocks of the model."""
        return [s for s in self.model.anatomy.sites.values() if s.block is not None]

    def weight(self, site: Site) -> Tensor:
        """Float32 [out, in]."""
        return read_weight(self.model, site)

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight [out, in] at the level that is judged."""
        grid = grid_of(self.level_of(weight.shape[-1]), torch.float32)
        affine = grid.fit(weight)
        return grid.decode(grid.encode(weight, affine), affine).float()

    def rounding(self, chosen: Site) -> Callable[[Site, Tensor], Tensor]:
        """The override that rounds this site alone."""
        return lambda site, weight: self.rounded(weight) if site.name == chosen.name else weight

    def alike_in_blocks(self, scores: Tensor) -> dict[str, Tensor]:
        """Scores of blocks, [blocks, samples], as those of every site in them."""
        return {site.name: scores[site.block] for site in self.sites if site.block is not None}


Scores = Mapping[str, Tensor]
"""By site: samples, float [samples], whose mean is the score; more means that rounding it costs more."""


class Sensitivity(Method, Protocol):
    """A way to say how much each weight matrix in the blocks matters.

    prices: whether scores can be added up as a price of the rounding, or only put in order;
    samples: over what the samples of a score vary; "" where there is one;
    whole_blocks: whether all matrices of a block get the same score.
    """

    prices: ClassVar[bool]
    samples: ClassVar[str]
    whole_blocks: ClassVar[bool]

    def score(self, subject: Subject) -> Scores:
        """Raises InputError where the profile lacks what it needs, or no model was given."""
        ...
