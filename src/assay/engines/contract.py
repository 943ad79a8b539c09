"""What an engine can hold; the planner sees nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from assay.model.level import Level


@dataclass(frozen=True)
class Contract:
    """Rules of one engine.

    layout: how weights are stored; since: the first version known to read it; fused: roles that share
    one level; group_sizes: None is one group per row; head, embedding, experts, transposed: whether
    these may be compressed.
    """

    name: str
    layout: str
    since: str
    bits: tuple[int, ...]
    group_sizes: tuple[int | None, ...]
    symmetric: tuple[bool, ...]
    fused: tuple[frozenset[str], ...] = ()
    head: bool = False
    embedding: bool = False
    experts: bool = False
    transposed: bool = False
    unreadable: tuple[str, ...] = ()
    reads_expert_models: bool = True

    def refusal(self, family: str, has_experts: bool) -> str | None:
        """Why nothing of this family may be compressed for the engine; None when it may."""
        if family in self.unreadable:
            return f"{self.name} can't open compressed {family} models"
        if has_experts and not self.reads_expert_models:
            return f"{self.name} loses the experts of a compressed checkpoint (use --engine vllm)"
        return None

    def levels(
        self, role: str, shape: tuple[int, int], transposed: bool, expert: int | None, block: int | None
    ) -> list[Level] | str:
        """Levels allowed for a weight of `shape` (out, in), or why it must stay as it is."""
        if transposed and not self.transposed:
            return f"{self.name} can't hold a transposed (Conv1D) layer in {self.layout}"
        if expert is not None and not self.experts:
            return f"{self.name} does not read compressed experts"
        if role == "head" and not self.head:
            return f"{self.name} keeps the head"
        if role == "embedding" and not self.embedding:
            return f"{self.name} keeps the embedding"
        sizes = [g for g in self.group_sizes if g is None or (shape[1] % g == 0 and g < shape[1])]
        return [Level(b, g, s) for b in self.bits for g in sizes for s in self.symmetric]
