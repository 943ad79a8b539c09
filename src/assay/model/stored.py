"""Where a stored tensor lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies and what it is; read: makes it, where its file isn't of safetensors."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor] | None = None
