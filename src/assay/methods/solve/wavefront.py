"""Error feedback along inputs and outputs at once: GPTQ for the metric tr(G D H D^T).

The metric is the Kronecker product of G and H, and so is the factor of its inverse. Rounding the
weights one at a time, and moving all that are still to come by the conditional expectation of their
optimum, is Babai's nearest plane for that lattice (Babai 1986; for G = I it is GPTQ, Chen et al. 2025).
With q what weight (i, j) became,

    e_ij = (w_ij - q) / (A_ii U_jj),    every (k, l) with k >= i, l >= j loses A_ik e_ij U_jl

where inv(G) = A^T A and inv(H) = U^T U. A weight waits only for those above and to the left of it, so
all weights of an antidiagonal can be rounded together: out + in - 1 steps instead of out * in. It is
done in tiles: the antidiagonal of tiles is a batch, inside each tile runs a second wave, and between
tiles the feedback is a matrix product.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from assay.methods import compiled
from assay.methods.grid.base import Grid
from assay.model.threads import spread


class Wave(NamedTuple):
    """What one pass leaves behind, each [batch, out, in], float32."""

    centred: Tensor
    """Steps of the grid: what was chosen, before scaling."""
    targets: Tensor
    """What each weight had become by feedback when it was rounded."""


def wavefront(
    weight: Tensor,
    inputs_factor: Tensor,
    outputs_factor: Tensor,
    grid: Grid,
    parameters: Iterable[Tensor],
    tile: int = 16,
) -> Wave:
    """Round `weight` [batch, out, in], in the order of its rows and columns.

    inputs_factor: U [batch, in, in]; outputs_factor: A [batch, out, out], both upper.
    parameters: scale, lowest and highest step per weight, [batch, out, in] each; read once.
    With errors E, D = A^T E U and the sum of E^2 equals tr(G D H D^T).
    """
    _, rows, columns = weight.shape
    tiles = _Tiles(weight, inputs_factor, outputs_factor, grid, parameters, tile)
    for step in range(tiles.down + tiles.across - 1):
        tiles.round_diagonal(step)
    return Wave(tiles.join(tiles.centred)[:, :rows, :columns], tiles.join(tiles.values)[:, :rows, :columns])


class _Tiles:
    """The matrix cut into tiles [batch, down, across, tile, tile], the tile columns in reverse.

    Reversed, an antidiagonal of tiles is a diagonal of the two tile axes: `torch.diagonal` views it.
    """

    def __init__(
        self,
        weight: Tensor,
        inputs_factor: Tensor,
        outputs_factor: Tensor,
        grid: Grid,
        parameters: Iterable[Tensor],
        tile: int,
    ) -> None:
        self.tile, self.grid = tile, grid
        self.down, self.across = -(-weight.shape[1] // tile), -(-weight.shape[2] // tile)
        self.scale, self.low, self.high = (self.cut(p, filler) for p, filler in zip(parameters, (1.0, 0.0, 0.0), strict=True))
        self.values = self.cut(weight)  # become the targets
        self.centred, self.errors = torch.zeros_like(self.values), torch.zeros_like(self.values)
        # Q = E U so far, [batch, across, down, tile, tile]: what earlier rows of tiles hand down
        self.handed = torch.zeros_like(self.values.transpose(1, 2))
        upper, over = self._padded(inputs_factor), self._padded(outputs_factor)
        # strips of U, one per tile column, their rows in the reversed tile order of `errors`
        strips = upper.unflatten(1, (self.across, tile)).unflatten(3, (self.across, tile)).flip(1, 3)
        self.from_left = strips.flatten(1, 2).transpose(1, 2)
        self.inside_columns = strips.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
        strips = over.unflatten(1, (self.down, tile)).unflatten(3, (self.down, tile))
        self.from_above = over.mT.unflatten(1, (self.down, tile))
        self.inside_rows = strips.diagonal(dim1=1, dim2=3).permute(0, 3, 2, 1).contiguous()  # A_II^T

    def cut(self, matrix: Tensor, filler: float = 0.0) -> Tensor:
        """[batch, out, in] padded and cut to [batch, down, across reversed, tile, tile]."""
        extra = (0, -matrix.shape[2] % self.tile, 0, -matrix.shape[1] % self.tile)
        full = pad(matrix, extra, value=filler)
        cells = full.unflatten(1, (self.down, self.tile)).unflatten(3, (self.across, self.tile))
        return cells.transpose(2, 3).flip(2).contiguous()

    def join(self, cells: Tensor) -> Tensor:
        """The inverse of `cut`, padding included."""
        return cells.flip(2).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _padded(self, factor: Tensor) -> Tensor:
        """A factor with ones on the padded diagonal, so that padding moves nothing but padding."""
        extra = -factor.shape[-1] % self.tile
        if not extra:
            return factor
        full = pad(factor, (0, extra, 0, extra))
        full.diagonal(dim1=1, dim2=2)[:, factor.shape[-1] :] = 1
        return full

    def round_diagonal(self, step: int) -> None:
        """Round all tiles (I, J) with I + J = step."""
        offset = self.across - 1 - step
        rows = slice(max(0, -offset), min(self.down, self.across - offset))
        flipped = slice(rows.start + offset, rows.stop + offset)
        view = lambda cells: cells.diagonal(offset, 1, 2)  # noqa: E731  [batch, tile, tile, tiles]
        inside_rows, inside_columns = self.inside_rows[:, rows], self.inside_columns[:, flipped]
        carried = self._left(rows) @ self.from_left[:, flipped]
        above = self.from_above[:, rows] @ self.handed[:, flipped].flatten(2, 3)
        values = view(self.values).permute(0, 3, 1, 2) - above - inside_rows @ carried
        wave = _Wave(values, inside_rows, inside_columns)
        parts = (view(p).permute(0, 3, 1, 2).flatten(0, 1).flatten(1) for p in (self.scale, self.low, self.high))
        errors, centred, targets = wave.round(self.grid, *parts)
        for store, cells in ((self.errors, errors), (self.centred, centred), (self.values, targets)):
            view(store).copy_(cells.permute(0, 2, 3, 1))
        self.handed.diagonal(-offset, 1, 2).copy_((carried + errors @ inside_columns).permute(0, 2, 3, 1))

    def _left(self, rows: slice) -> Tensor:
        """Errors of whole rows of tiles, [batch, tiles, tile, in], inputs in reversed tile order."""
        return self.errors[:, rows].transpose(2, 3).flatten(3, 4)


class _Wave:
    """Antidiagonal by antidiagonal through a batch of independent tiles [batch, tiles, tile, tile]."""

    def __init__(self, values: Tensor, inside_rows: Tensor, inside_columns: Tensor) -> None:
        self.shape, self.tile = values.shape, values.shape[-1]
        self.values = values.flatten(0, 1).contiguous()
        self.rows = inside_rows.flatten(0, 1)  # A^T
        columns = inside_columns.flatten(0, 1)
        self.columns = columns.flip(1).contiguous()  # an antidiagonal climbs the columns
        self.step = self.rows.diagonal(dim1=1, dim2=2)[:, :, None] * columns.diagonal(dim1=1, dim2=2)[:, None, :]

    def round(self, grid: Grid, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(errors, centred codes, targets), each of the shape of the values."""
        if compiled.runs_on(self.values):
            return self._round_compiled(grid, scale, low, high)
        tile, flat, step = self.tile, self.values.flatten(1), self.step.flatten(1)
        errors, centred, targets = (torch.empty_like(flat) for _ in range(3))
        for t in range(2 * tile - 1):
            first, last = max(0, t - tile + 1), min(t, tile - 1)
            # entries (a, t - a): t, t + (tile - 1), ... in the flattened tile
            line = slice(first * (tile - 1) + t, last * (tile - 1) + t + 1, max(tile - 1, 1))
            present, spacing = flat[:, line].clone(), scale[:, line]
            codes = grid.snap(present, spacing, low[:, line], high[:, line])
            error = (present - grid.level(codes, spacing)) / step[:, line]
            errors[:, line], centred[:, line], targets[:, line] = error, codes, present
            push = self.rows[:, :, first : last + 1] * error[:, None, :]
            reach = self.columns[:, first + tile - 1 - t : last + tile - t]
            self.values.baddbmm_(push, reach, alpha=-1)
        return errors.view(self.shape), centred.view(self.shape), targets.view(self.shape)

    def _round_compiled(self, grid: Grid, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`round` by `compiled.round_tiles`."""
        errors, centred = torch.empty_like(self.values), torch.empty_like(self.values)
        cells = (self.values, self.rows, self.columns.flip(1), scale, low, high, errors, centred)
        shaped = tuple(c.reshape(self.values.shape).contiguous() for c in cells)
        facts = (grid.fine, compiled.ROUNDING[grid.scale_dtype], grid.table)
        spread(compiled.round_tiles, len(errors), facts, shaped)
        targets, errors, centred = (shaped[i].view(self.shape) for i in (0, 6, 7))
        return errors, centred, targets
