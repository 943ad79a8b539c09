"""The first tokens and the latest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from assay.methods.cache._evict import Evict
from assay.runtime.attention import Step


@dataclass(frozen=True)
class StreamingLLM(Evict):
    """Keeps the first `sinks` tokens and the latest; positions stay those of the text."""

    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks (2023), with true positions"
    shared: ClassVar[bool] = True
    sinks: int = 4

    def score(self, step: Step, past: tuple[Tensor, ...]) -> Tensor:
        """Later is better."""
        return step.positions[:, :1].float()


METHOD = StreamingLLM
