"""A tensor of slots that grows, shrinks and forgets in place."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.runtime import slots

HALVES = {torch.float16: 0, torch.bfloat16: 1}
ROOM = 32
SHARE = 64


class Grown:
    """A tensor [B, H or 1, slots, ...]; `view` is what is in use of `data`, which keeps room for tokens to come.

    The room is 1/64 of the slots and at least 32 of them, so a token more is a copy of the whole once in so many steps.
    """

    def __init__(self) -> None:
        self.data = torch.empty(0)
        self._count = 0
        self._array: Any = None

    def __len__(self) -> int:
        return self._count

    @property
    def view(self) -> Tensor:
        """What is in use."""
        full = self.data.ndim < 3 or self._count == self.data.shape[2]
        return self.data if full else self.data.narrow(2, 0, self._count)

    @property
    def array(self) -> Any:
        """`data` on a CPU as numpy has it, 16-bit floats by their bits: to write to it takes a tenth of torch's time."""
        if self._array is None:
            self._array = array_of(self.data)
        return self._array

    def append(self, x: Tensor) -> None:
        """Add slots; the first come without room."""
        if self.data.ndim < 3:
            whole = x.untyped_storage().nbytes() == x.nbytes
            self.put(x.contiguous() if whole else x.clone(memory_format=torch.contiguous_format))
            return
        self.extend(x.shape[2], torch.promote_types(self.data.dtype, x.dtype))
        self.data.narrow(2, self._count - x.shape[2], x.shape[2]).copy_(x)

    def extend(self, count: int = 1, dtype: torch.dtype | None = None) -> None:
        """Add slots that hold anything; the first slots must be there."""
        before, need = self._count, self._count + count
        dtype = dtype or self.data.dtype
        if need > self.data.shape[2] or dtype != self.data.dtype:
            room = need + max(ROOM, before // SHARE)
            grown = self._room((*self.data.shape[:2], room, *self.data.shape[3:]), dtype, self.data.device)
            grown[:, :, :before] = self.view
            self.data, self._array = grown, None
        self._count = need

    def fill(self, number: int) -> None:
        """Add a slot of this number everywhere."""
        self.extend()
        if self.data.device.type == "cpu":
            self.array[:, :, self._count - 1] = number
        else:
            self.data.select(2, self._count - 1).fill_(number)

    def put(self, x: Tensor) -> None:
        """Hold this tensor instead."""
        self.data, self._count, self._array = x.contiguous(), x.shape[2], None

    def whole(self) -> Tensor:
        """All slots, where the model computes."""
        return self.view

    def take(self, index: Tensor) -> Tensor:
        """Slots int [B, H or 1, n], where the model computes."""
        return gather(self.view, index)

    def _room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    def keep(self, index: Tensor) -> None:
        """Keep these slots only: int [B, H or 1, n]."""
        self.put(gather(self.view, index))

    def move_last(self, slot: Tensor) -> None:
        """Put the last slot where `slot` [B, H or 1, 1] is, and forget the last."""
        self._count -= 1
        if self.data.device.type == "cpu":
            slots.move(self.array, slot.cpu().numpy(), self._count)
            return
        last = self.data.narrow(2, self._count, 1)
        place = slot.view(*slot.shape, *[1] * (last.ndim - slot.ndim)).expand_as(last)
        self.data.scatter_(2, place, last.clone())

    def drop_first(self, count: int) -> None:
        """Forget the first slots and the room."""
        self.put(self.view[:, :, count:].clone())

    def crop(self, count: int) -> None:
        """Forget the last slots."""
        self._count -= count

    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch."""
        if self.data.ndim > 2:
            self.put(self.view[index.to(self.view.device)])


class Away(Grown):
    """Slots that don't lie where the model computes: in pinned host memory for a GPU, in a file mapped into memory for a CPU.

    The file has no name, so nothing is left of it when the cache goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def put(self, x: Tensor) -> None:
        """Hold a copy."""
        self.device = x.device if self.data.ndim < 3 else self.device
        held = self._room(x.shape, x.dtype, self.device)
        super().put(held.copy_(x))

    def whole(self) -> Tensor:
        """All slots, brought to where the model computes."""
        return self.view.to(self.device)

    def take(self, index: Tensor) -> Tensor:
        """These slots only are brought."""
        return gather(self.view, index.to(self.view.device)).to(self.device, non_blocking=True)

    def _room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return torch.empty(*shape, dtype=dtype, pin_memory=True)
        size = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile() as file:
            mapped = np.memmap(file, np.uint8, "w+", shape=(max(size, 1),))
        return torch.from_numpy(mapped)[:size].view(dtype).view(*shape)


def array_of(x: Tensor) -> Any:
    """A dense tensor on a CPU as numpy has it, 16-bit floats by their bits."""
    dense = x.detach().contiguous()
    return (dense.view(torch.int16) if dense.dtype in HALVES else dense).numpy()


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Slots of [B, H or 1, S, ...] by index [B, H or 1, n], in a tensor of its own."""
    if x.shape[1] == 1:
        index = index[:, :1]
    index = index.expand(x.shape[0], x.shape[1], -1)
    return x.gather(2, index.reshape(*index.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:]))
