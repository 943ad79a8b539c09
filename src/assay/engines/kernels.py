"""Linear layers whose weights stay compressed: torch's kernels for 4 and 8 bits, otherwise decoded at every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from assay.model.level import Level
from assay.model.ordered import PackedOrdered
from assay.model.packed import Packed, PackedInteger
from assay.model.terms import PackedSum

KERNEL_GROUPS = (256, 128, 64, 32)
KERNEL_ROWS = 16


class Product(nn.Module):
    """x -> x Wᵀ of one compressed weight [out, in]; decodes it at every call."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed.decode()
        return linear(x, weight.to(x.dtype))


class Int4Product(nn.Module):
    """Integers of up to 4 bits through `_weight_int4pack_mm_for_cpu`: (code - 8) * scale + zero, groups of 32 to 256 inputs.

    Zero is rounded to the scale's dtype, and so are the kernel's sums: equal to the decoded weight up to that rounding.
    """

    codes: Tensor
    pairs: Tensor

    def __init__(self, weight: PackedInteger) -> None:
        super().__init__()
        rows, columns = weight.codes.shape
        size = _kernel_group(weight)
        assert size is not None
        self.rows, self.size, spare = rows, size, -rows % KERNEL_ROWS
        repeat = columns // weight.scale.shape[1] // size
        scale = weight.scale.repeat_interleave(repeat, 1)
        zero = (8 - weight.zero_point.float().repeat_interleave(repeat, 1)) * scale.float()
        pairs = pad(torch.stack([scale, zero.to(scale.dtype)], -1), (0, 0, 0, 0, 0, spare))
        codes = pad(weight.codes.int(), (0, 0, 0, spare))
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), persistent=False)
        self.register_buffer("pairs", pairs.transpose(0, 1).contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.pairs.dtype).contiguous()
        made = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, self.size, self.pairs)
        return made[:, : self.rows].to(x.dtype).unflatten(0, x.shape[:-1])


class Int8Product(nn.Module):
    """Integers of up to 8 bits with a scale a row through `_weight_int8pack_mm`; zero points are added after it."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, weight: PackedInteger) -> None:
        super().__init__()
        middle = 1 << (int(weight.level.bits) - 1)
        self.register_buffer("codes", (weight.codes.short() - middle).to(torch.int8), persistent=False)
        self.register_buffer("scale", weight.scale[:, 0].contiguous(), persistent=False)
        offset = (middle - weight.zero_point[:, 0].float()) * self.scale.float()
        self.register_buffer("offset", offset if bool(offset.any()) else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.scale.dtype).contiguous()
        made = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.scale)
        if self.offset is not None:
            made = (made.float() + flat.float().sum(-1, keepdim=True) * self.offset).to(made.dtype)
        return made.to(x.dtype).unflatten(0, x.shape[:-1])


class SumProduct(nn.Module):
    """Codes, a low-rank product, and what the exact weights differ by as a sparse matrix."""

    low: Tensor | None
    high: Tensor
    exact: Tensor | None

    def __init__(self, weight: PackedSum) -> None:
        super().__init__()
        self.base = product(weight.base)
        low, high = weight.factors or (None, None)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.register_buffer("exact", _difference(weight) if weight.exact is not None else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.base(x)
        if self.low is not None:
            made = made + linear(linear(x, self.high.to(x.dtype)), self.low.to(x.dtype))
        if self.exact is not None:
            flat = x.reshape(-1, x.shape[-1]).float()
            made = made + (self.exact @ flat.T).T.to(x.dtype).unflatten(0, x.shape[:-1])
        return made


class OrderedProduct(nn.Module):
    """Groups that are not neighbours: the inputs are sorted first."""

    order: Tensor

    def __init__(self, weight: PackedOrdered) -> None:
        super().__init__()
        self.base = product(weight.base)
        self.register_buffer("order", weight.order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x[..., self.order])


def product(weight: Packed) -> nn.Module:
    """The fastest product that torch has for a compressed weight on a CPU."""
    if isinstance(weight, PackedSum):
        return SumProduct(weight)
    if isinstance(weight, PackedOrdered):
        return OrderedProduct(weight)
    if isinstance(weight, PackedInteger):
        if weight.level.bits <= 4 and _kernel_group(weight) and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return Int4Product(weight)
        if weight.scale.shape[1] == 1 and hasattr(torch.ops.aten, "_weight_int8pack_mm"):
            return Int8Product(weight)
    return Product(weight)


def _kernel_group(weight: PackedInteger) -> int | None:
    """The largest group of the kernel that divides the weight's own."""
    size = weight.codes.shape[1] // weight.scale.shape[1]
    return next((g for g in KERNEL_GROUPS if size % g == 0), None)


def held_nbytes(level: Level, rows: int, columns: int, itemsize: int) -> int:
    """At most so many bytes does a weight [rows, columns] take in memory while `product` runs it; itemsize: of a scale.

    Integers of up to 4 bits are held in 4 bits, in groups that the kernel knows; trellis codes as they are stored; all others
    in a byte a weight and their scales.
    """
    stored = level.nbytes(rows, columns, itemsize)
    if level == level.base and level.format == "trellis":
        return stored
    size = columns if level.group_size is None else level.group_size
    fitting = next((g for g in KERNEL_GROUPS if size % g == 0), None)
    if level == level.base and level.format == "int" and level.bits <= 4 and fitting:
        padded = rows + -rows % KERNEL_ROWS
        return padded * columns // 2 + 2 * itemsize * padded * (columns // fitting)
    return rows * (columns + 4) + max(0, stored - int(rows * columns * level.bits) // 8)


def _difference(weight: PackedSum) -> Tensor:
    """Exact weights less what codes and factors give there, float32 [out, in] in compressed rows."""
    assert weight.exact is not None
    rough = PackedSum(weight.level, weight.base, weight.factors).decode().float()
    starts, columns = weight.exact.starts.long(), weight.exact.columns.long()
    rows = torch.repeat_interleave(torch.arange(len(rough)), starts.diff())
    change = weight.exact.values.float() - rough[rows, columns]
    return torch.sparse_csr_tensor(starts, columns, change, size=rough.shape, check_invariants=False)


class PackedLinear(nn.Linear):
    """A linear layer over a compressed weight; `weight` decodes it. Gradients flow to the inputs, not to the weight.

    again: makes the compressed weight anew, for what asks for `weight`; the kernels keep codes of their own.
    """

    def __init__(self, again: Callable[[], Packed], bias: Tensor | None, shape: tuple[int, int], kernels: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        weight = again()
        self.product = product(weight) if kernels else Product(weight)
        self.level, self.again = weight.level, again

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Decoded [out, in], anew at every access."""
        product = self.product
        return (product.packed if isinstance(product, Product) else self.again()).decode()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        if torch.is_grad_enabled() and x.requires_grad:
            made = linear(x, self.weight.to(x.dtype))
        else:
            made = self.product(x)
        return made if self.bias is None else made + self.bias.to(made.dtype)

    def extra_repr(self) -> str:
        """As torch prints a layer."""
        kernel = type(self.product).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.level.name}, {kernel}"


class PackedExperts:
    """The matrices of a layer's experts in place of one 3-D parameter [experts, out, in]; indexing decodes one expert."""

    def __init__(self, experts: list[list[Packed]], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.experts = experts
        self.shape, self.dtype = torch.Size(shape), dtype
        self.device = torch.device("cpu")

    def __getitem__(self, index: int | Tensor) -> Tensor:
        return torch.cat([part.decode() for part in self.experts[int(index)]]).to(self.dtype)
