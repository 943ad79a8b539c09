"""Round to nearest on a grid whose range was searched per group, errors weighted by diag H.

The clipping half of AWQ (Lin et al., 2023) with the layer's output error replaced by its diagonal.
Queries and keys are clipped as well, which AWQ leaves out.
"""

from collections.abc import Sequence

from torch import Tensor

from assay.methods.grid.base import SHRINKS, Grid
from assay.methods.solve.curvature import diagonal
from assay.methods.solve.rounded import Rounded, check


def solve(
    weight: Tensor,
    grid: Grid,
    H: Tensor | None = None,
    G: Tensor | None = None,
    shrinks: Sequence[float] = SHRINKS,
) -> Rounded:
    """Round `weight` [..., out, in] with H [..., in, in] (None: all inputs weigh the same); G is ignored."""
    check(weight, grid, H)
    affine = grid.fit_clipped(weight, None if H is None else diagonal(H), shrinks)
    return Rounded(grid.encode(weight, affine), affine)
