"""What every rounding solver takes and returns."""

from dataclasses import dataclass

from torch import Tensor

from assay.methods.grid.base import Affine, Grid
from assay.model.finite import finite


@dataclass
class Rounded:
    """A weight rounded to a grid."""

    codes: Tensor
    """uint8 [..., out, in]; `grid.decode(codes, affine)` is the compressed weight."""
    affine: Affine
    """Scale and zero point, [..., out, groups] each."""


def check(weight: Tensor, grid: Grid, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """ValueError for a weight [..., out, in] that cannot be rounded, or curvature that does not fit it."""
    check_shapes(weight, inputs, outputs)
    grid.groups(weight.shape[-1])


def check_shapes(weight: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """`check` without the grid."""
    if weight.dim() < 2:
        raise ValueError(f"a weight has an output and an input axis; this one has shape {tuple(weight.shape)}")
    *batch, rows, columns = weight.shape
    for name, tensor, shape in (
        ("weight", weight, (*batch, rows, columns)),
        ("H", inputs, (*batch, columns, columns)),
        ("G", outputs, (*batch, rows, rows)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the weight asks for {shape}")
        if not finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity")


def flatten_batch(tensor: Tensor) -> Tensor:
    """Any leading axes as one, in float32: [batch, rows, columns]."""
    return tensor.float()[None] if tensor.dim() == 2 else tensor.float().flatten(0, -3)
