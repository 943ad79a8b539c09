"""Where a stored tensor lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies and what it is.

    start: of its bytes in the file; read: makes it, where the file isn't of safetensors; renamed: whether the file has no
    such name in its header.
    """

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0
    read: Callable[[], Tensor] | None = None
    renamed: bool = False
