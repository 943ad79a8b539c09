"""What the solvers ask of a grid of scalar levels, and how weights are cut into groups."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHRINKS = tuple(1 - i / 20 for i in range(11))
"""Fractions of the covering range tried by a clip search: 1.00, 0.95, ... 0.50."""


class Affine(NamedTuple):
    """Parameters of a fitted grid, one pair per output row and group of inputs."""

    scale: Tensor
    """[..., out, groups], the grid's `scale_dtype`; positive on an integer grid."""
    zero_point: Tensor
    """[..., out, groups], uint8, the code that decodes to 0; all 0 and unused on a table of values."""


class Grid(Protocol):
    """Levels times a scale per group: decoded = step * scale, rounded once to `scale_dtype`.

    A level has two names. Its code (uint8) is what is stored. Its step (float32) is the level before
    scaling: on an integer grid the code counted from the zero point, on a table the value itself.
    """

    @property
    def bits(self) -> int:
        """Stored bits of a code."""
        ...

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales and of decoded weights."""
        ...

    @property
    def fine(self) -> bool:
        """Whether rounding to `scale_dtype` can move a level past the middle between two levels."""
        ...

    @property
    def table(self) -> NDArray[np.float32] | None:
        """What the compiled loops look steps up in, see `compiled.look_up`; None: steps are integers."""
        ...

    def groups(self, inputs: int) -> int:
        """How many groups a row of `inputs` weights has; ValueError if it cannot be cut evenly."""
        ...

    def stored_bits(self, inputs: int) -> float:
        """Stored bits per weight of rows of `inputs` weights."""
        ...

    def fit(self, weight: Tensor) -> Affine:
        """The grid that spans the weights [..., out, in] of each group, without a search."""
        ...

    def fit_clipped(self, weight: Tensor, importance: Tensor | None = None, shrinks: Sequence[float] = SHRINKS) -> Affine:
        """The grid with the smallest weighted rounding error that was found; by `squared_errors` never worse than `fit`.

        importance: what a squared error costs, [..., in] or [..., out, in]; None: all equal.
        """
        ...

    def encode(self, weight: Tensor, affine: Affine) -> Tensor:
        """Codes [..., out, in] (uint8) of the levels nearest to `weight`."""
        ...

    def decode(self, codes: Tensor, affine: Affine) -> Tensor:
        """The weights [..., out, in] in `scale_dtype`, as a reader of the stored form makes them."""
        ...

    def squared_errors(self, weight: Tensor, affine: Affine) -> Tensor:
        """What rounding `weight` to nearest costs at each weight, [..., out, in], float32."""
        ...

    def centred(self, affine: Affine) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, lowest step, highest step) of each group, float32."""
        ...

    def per_weight(self, affine: Affine, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """`centred` repeated over each group's inputs, [..., out, in]."""
        ...

    def snap(self, values: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Steps (float32) whose levels are nearest to float32 `values`; broadcasts."""
        ...

    def beside(self, steps: Tensor, side: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The next step above (`side` > 0) or below; past the end of the grid the one on the other side."""
        ...

    def level(self, steps: Tensor, scale: Tensor) -> Tensor:
        """What steps decode to, as float32; rounded once to `scale_dtype`."""
        ...

    def codes(self, steps: Tensor, low: Tensor) -> Tensor:
        """The codes (uint8) of steps."""
        ...

    def round_scale(self, scale: Tensor) -> Tensor:
        """Scales [..., out, groups] as they are stored, in `scale_dtype`; finite and never 0."""
        ...


# ---- groups --------------------------------------------------------------------------------


def group_count(inputs: int, group_size: int | None) -> int:
    """Groups of `group_size` (None: all) in a row of `inputs`; ValueError if it cannot be cut evenly."""
    size = group_size or inputs
    if inputs % size:
        divisors = [d for d in range(1, inputs + 1) if inputs % d == 0]
        raise ValueError(f"groups of {size} do not divide {inputs} inputs; these sizes do: {divisors}")
    return inputs // size


def check_storage(group_size: int | None, scale_dtype: torch.dtype) -> None:
    """ValueError for a group without weights, or scales in a dtype that no checkpoint stores them in."""
    if group_size is not None and group_size < 1:
        raise ValueError(f"a group holds at least one weight, not {group_size}")
    if not scale_dtype.is_floating_point or scale_dtype.itemsize < 2:
        raise ValueError(f"scales are stored as bf16, fp16 or fp32, not {scale_dtype}")


def in_groups(weight: Tensor, groups: int) -> Tensor:
    """`weight` [..., in] as float32 [..., groups, group_size]."""
    return weight.float().unflatten(-1, (groups, -1))


def importance_in_groups(importance: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`importance` [..., in] or [..., out, in] as float32, broadcastable to the grouped weight."""
    cut = in_groups(importance, groups)
    return cut.unsqueeze(-3) if importance.dim() < weight.dim() else cut


def over_inputs(affine: Affine, inputs: int, parameters: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Three parameters [..., out, groups] repeated over the inputs of each group, [..., out, in]."""
    size = inputs // affine.scale.shape[-1]
    scale, low, high = (p.repeat_interleave(size, -1) for p in parameters)
    return scale, low, high


class Costs(NamedTuple):
    """Weights and importance as the compiled searches take them, float32 and contiguous."""

    weight: Tensor
    """[matrices, out, in]"""
    shared: Tensor
    """[matrices, in], the importance if all rows have the same"""
    each: Tensor
    """[matrices, out, in], or no columns if `shared` holds it"""


def flat_costs(weight: Tensor, importance: Tensor | None) -> Costs:
    """`weight` [..., out, in] and `importance` (see `Grid.fit_clipped`) with the leading axes as one."""
    *batch, rows, columns = weight.shape
    matrices = math.prod(batch)
    flat = weight.detach().float().reshape(matrices, rows, columns).contiguous()
    shared, each = torch.ones(matrices, columns), flat[..., :0]
    if importance is not None and importance.dim() == weight.dim():
        each = importance.float().reshape(flat.shape).contiguous()
    elif importance is not None:
        shared = importance.float().expand(*batch, columns).reshape(matrices, columns).contiguous()
    return Costs(flat, shared, each)
