"""Integer codes whose groups are not neighbouring inputs (GPTQ's activation order)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.model.errors import InputError
from assay.model.level import Level
from assay.model.packed import PackedInteger


@dataclass(frozen=True)
class PackedOrdered:
    """A weight whose inputs `base` holds in the order in which they share groups.

    base: the columns sorted by group; order: int64 [in], the input that each column of `base` is of.
    """

    base: PackedInteger
    order: Tensor

    @classmethod
    def of(cls, codes: PackedInteger, groups: Tensor) -> PackedInteger | PackedOrdered:
        """Codes in the model's order, and the group of every input, int [in]. Neighbours need no order.

        Raises InputError for groups of unequal size.
        """
        columns, size = codes.codes.shape[1], codes.codes.shape[1] // codes.scale.shape[1]
        order = torch.argsort(groups.long(), stable=True)
        if not torch.equal(groups.long()[order], torch.arange(columns) // size):
            raise InputError(f"the groups of {columns} inputs are not all of size {size}; download the model again")
        if torch.equal(order, torch.arange(columns)):
            return codes
        return cls(replace(codes, codes=codes.codes[:, order].contiguous()), order)

    @property
    def level(self) -> Level:
        return self.base.level

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def groups(self) -> Tensor:
        """The group of every input, int32 [in]."""
        found = torch.empty_like(self.order, dtype=torch.int32)
        found[self.order] = torch.arange(len(self.order), dtype=torch.int32) // self.level_size
        return found

    @property
    def level_size(self) -> int:
        """Inputs of one group."""
        return len(self.order) // self.base.scale.shape[1]

    @property
    def in_order(self) -> PackedInteger:
        """The codes with their columns in the model's order; scales stay those of `groups`."""
        codes = torch.empty_like(self.base.codes)
        codes[:, self.order] = self.base.codes
        return replace(self.base, codes=codes)

    def decode(self) -> Tensor:
        """Weight [out, in] in the scale's dtype."""
        sorted_columns = self.base.decode()
        weight = torch.empty_like(sorted_columns)
        weight[:, self.order] = sorted_columns
        return weight

    def tensors(self) -> dict[str, Tensor]:
        """As compressed-tensors stores them."""
        return self.in_order.tensors() | {"weight_g_idx": self.groups}
