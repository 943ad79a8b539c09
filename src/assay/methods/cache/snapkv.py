"""What the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from assay.methods.cache._evict import Evict
from assay.model.errors import InputError
from assay.runtime.attention import Step
from assay.runtime.select import pool


@dataclass(frozen=True)
class SnapKV(Evict):
    """Keeps what the last `window` queries of the prompt attend to, smoothed over neighbours; generated tokens stay.

    The window itself stays, as far as it fills no more than half the budget.
    """

    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation (2024), scored by the group's mean"
    grows: bool = True
    window: int = 32
    kernel: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"a kernel of {self.kernel}; give an odd number")

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """Mean attention of the window, smoothed."""
        return pool(step.column_sums(self.window), self.kernel, self.pooling, step.positions >= 0)

    def recent(self, capacity: int) -> int:
        """The window."""
        return min(self.window, capacity // 2)


METHOD = SnapKV
