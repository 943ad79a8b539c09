"""A table of values whose scales are shared by square tiles (FP8 blocks, as in DeepSeek-V3 Technical Report, 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from assay.methods.grid.base import SHRINKS, Affine
from assay.methods.grid.table import TableGrid


@dataclass(frozen=True)
class TileGrid(TableGrid):
    """`TableGrid` of which `tile` rows share the scales of their groups; the last tile may have fewer."""

    tile: int = 128

    def fit_clipped(self, weight: Tensor, importance: Tensor | None = None, shrinks: Sequence[float] = SHRINKS) -> Affine:
        """The covering scales: a float loses no precision below its largest value, so clipping has nothing to win."""
        return self.fit(weight)

    def stored_bits(self, inputs: int) -> float:
        """See `TableGrid`; a scale counts for all rows of a tile."""
        return self.bits + (super().stored_bits(inputs) - self.bits) / self.tile

    def round_scale(self, scale: Tensor) -> Tensor:
        """Scales [..., out, groups] as they are stored: the largest of a tile for all of its rows."""
        rows = scale.shape[-2]
        tiles = pad(scale, (0, 0, 0, -rows % self.tile)).unflatten(-2, (-1, self.tile))
        shared = super().round_scale(tiles.amax(-2)).repeat_interleave(self.tile, -2)
        return shared[..., :rows, :]
