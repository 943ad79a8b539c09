"""Sees every product with a site's weight while a block runs, whatever module or function computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from assay.model.sites import Site

OnProduct = Callable[[list[Site], Tensor, Tensor], None]


class Enough(Exception):
    """Raised by an `OnProduct` that needs no more of a run."""


class Capture(TorchFunctionMode):
    """Calls `on_product(sites, x, y)` for y = x Wᵀ of each site's weight W.

    x: [..., in], y: [..., out of all the sites together]. Weights are known by their address, so
    linear layers, Conv1D and experts cut from one 3-D parameter are all seen the same way.
    early: called before y is computed, with an empty one in its place; raising `Enough` then spares the product.
    """

    def __init__(self, block: nn.Module, prefix: str, sites: Iterable[Site], on_product: OnProduct, early: bool = False) -> None:
        super().__init__()
        self.on_product, self.early = on_product, early
        self.by_address: dict[int, list[Site]] = {}
        for site in sites:
            weight: Tensor = block.get_parameter(site.parameter.removeprefix(prefix + "."))
            if site.expert is not None:
                weight = weight[site.expert]
            self.by_address.setdefault(weight.data_ptr(), []).append(site)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        found, operands = None, _OPERANDS.get(func)
        if operands is not None and len(args) > operands[1]:
            x, weight = args[operands[0]], args[operands[1]]
            found = self.by_address.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
        if found and self.early:
            with torch._C.DisableTorchFunction():
                self.on_product(found, x, x.new_empty(0))
        result = func(*args, **(kwargs or {}))
        if found and not self.early:
            with torch._C.DisableTorchFunction():
                self.on_product(found, x, result)
        return result


_OPERANDS = {
    functional.linear: (0, 1), torch.addmm: (1, 2), torch.matmul: (0, 1), Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1), torch.mm: (0, 1),
}  # fmt: skip
