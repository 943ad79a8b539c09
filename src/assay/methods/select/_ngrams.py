"""What a selector is, and hashed n-grams, by which windows of text are told apart."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from assay.methods.base import Method


class Selector(Method, Protocol):
    """Chooses windows of tokens from a pool."""

    def select(self, pool: Tensor, target: Tensor | None, count: int, seed: int) -> Tensor:
        """Places of `count` different windows, int64, in random order.

        pool: token ids [windows, length], at least `count` windows; target: [windows, any length], text that the choice should be
        like, where `needs` names it.
        """
        ...


def counts(ids: Tensor, buckets: int) -> Tensor:
    """How often the n-grams of one and two tokens in each bucket occur: ids [windows, length] -> float32 [windows, buckets].

    Single tokens and pairs are hashed apart.
    """
    single = _mixed(ids + 1, 0)
    pairs = _mixed(_mixed(ids[:, :-1] + 1, 1) + ids[:, 1:], 2)
    places = torch.cat([single, pairs], 1) % buckets
    return torch.zeros(len(ids), buckets).scatter_add_(1, places, torch.ones(places.shape))


def _mixed(values: Tensor, salt: int) -> Tensor:
    """Integers below 2^31, scattered (the finalizer of MurmurHash3, 2011, on 32 bits)."""
    mask = 0xFFFFFFFF
    x = (values + salt * 0x3C6EF372) & mask
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):
        x = ((x ^ (x >> 16)) & mask) * factor & mask
        x = x ^ (x >> shift)
    return x & 0x7FFFFFFF
