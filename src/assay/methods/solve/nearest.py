"""Round to nearest on the min-max grid: no data, no search. The baseline of every table."""

from torch import Tensor

from assay.methods.grid.base import Grid
from assay.methods.solve.rounded import Rounded, check


def solve(weight: Tensor, grid: Grid, H: Tensor | None = None, G: Tensor | None = None) -> Rounded:
    """Round `weight` [..., out, in]; H and G are accepted and ignored."""
    check(weight, grid)
    affine = grid.fit(weight)
    return Rounded(grid.encode(weight, affine), affine)
