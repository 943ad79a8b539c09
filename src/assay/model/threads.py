"""How many threads a piece of work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORTH_SHARING = 1 << 20


@contextmanager
def threads_for(weights: int) -> Iterator[None]:
    """One thread while matrices of so few weights are treated: waking others would cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if weights >= WORTH_SHARING else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
