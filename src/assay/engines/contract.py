"""What an engine can hold; the planner sees nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from assay.engines.layout import LAYOUTS
from assay.model.checkpoint import Checkpoint
from assay.model.level import FORMATS, Level

JOINED = (frozenset({"attn.q", "attn.k", "attn.v"}), frozenset({"mlp.gate", "mlp.up"}), frozenset({"attn.q_a", "attn.kv_a"}))
"""Roles that vLLM loads as one matrix each; see also `FUSED` of GPTQ's layout."""


@dataclass(frozen=True)
class Contract:
    """Rules of one engine.

    layout: how weights are stored, see `LAYOUTS`; since: the first version known to read it; formats: see `FORMATS`;
    bits, group_sizes (None is one group per row) and symmetric narrow them, () for all; also: further levels by name;
    sums: whether exact weights and low-rank terms may go with the codes; one_level: whether all weights share a level;
    fused: roles that share one level; head, embedding, experts, transposed: whether these may be compressed;
    least_outputs: rows that a matrix must have; multiples: of what its rows and columns must be; whole_words: whether
    the integer codes of a row and the zero points of a column must fill words of 32 bits; expert_names: the only names of
    experts' matrices that it finds, () for all; expert_formats: formats of experts, symmetric ones only, () for all;
    rules: what the engine would refuse in a written checkpoint, one sentence each; readable: families that it can open,
    () for all; experts_by_role: whether a layer's experts of one role share one level; preferred: formats that plans
    keep to, the first of these with which the budget can be met, before all are offered.
    """

    name: str
    layout: str
    since: str
    formats: tuple[str, ...] = ("int",)
    bits: tuple[float, ...] = ()
    group_sizes: tuple[int | None, ...] = ()
    symmetric: tuple[bool, ...] = ()
    also: tuple[str, ...] = ()
    sums: bool = False
    one_level: bool = False
    fused: tuple[frozenset[str], ...] = ()
    head: bool = False
    embedding: bool = False
    experts: bool = False
    transposed: bool = False
    least_outputs: int = 1
    multiples: tuple[int, int] = (1, 1)
    whole_words: bool = False
    unreadable: tuple[str, ...] = ()
    reads_expert_models: bool = True
    expert_names: tuple[str, ...] = ()
    expert_formats: tuple[str, ...] = ()
    rules: Callable[[Checkpoint], list[str]] | None = None
    readable: tuple[str, ...] = ()
    experts_by_role: bool = False
    preferred: tuple[tuple[str, ...], ...] = ()

    def narrowed(self) -> tuple[Contract, ...]:
        """The contract with its preferred formats only, for each choice of them, and at last as it is."""
        return (*(replace(self, formats=formats, preferred=()) for formats in self.preferred), self)

    def narrowest(self, levels: Iterable[Level]) -> Contract:
        """The first of `narrowed` that has the formats of these levels."""
        wanted = {level.format for level in levels}
        return next((c for c in self.narrowed() if wanted <= set(c.formats)), self)

    def refusal(self, family: str, has_experts: bool) -> str | None:
        """Why nothing of this family may be compressed for the engine; None when it may."""
        if family in self.unreadable or (self.readable and family not in self.readable):
            return f"{self.name} can't open compressed {family} models"
        if has_experts and not self.reads_expert_models:
            return f"{self.name} loses the experts of a compressed checkpoint (use --engine vllm)"
        return None

    def refuses(
        self, role: str, shape: tuple[int, int], transposed: bool, expert: int | None, name: str = ""
    ) -> str | None:  # fmt: skip
        """Why a weight [out, in] must stay as it is; None when it may be compressed. name: of the stored tensor."""
        if transposed and not self.transposed:
            return f"{self.name} can't hold a transposed (Conv1D) layer in {self.layout}"
        if expert is not None and not self.experts:
            return f"{self.name} does not read compressed experts"
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if expert is not None and leaf and self.expert_names and leaf not in self.expert_names:
            wanted = ", ".join(self.expert_names)
            return f"{self.name} finds compressed experts named {wanted} only, not {leaf} (--engine gptq has no such rule)"
        if role == "head" and not self.head:
            return f"{self.name} keeps the head"
        if role == "embedding" and not self.embedding:
            return f"{self.name} keeps the embedding"
        if shape[0] < self.least_outputs:
            return f"{self.name} can't read compressed matrices of fewer than {self.least_outputs} outputs"
        if any(n % m for n, m in zip(shape, self.multiples, strict=True)):
            rows, columns = self.multiples
            return f"{self.name} packs {rows} outputs and {columns} inputs together; {shape[0]} and {shape[1]} don't divide"
        return None

    def takes(self, level: Level, columns: int, expert: bool = False, rows: int = 0) -> bool:
        """Whether a weight of so many inputs, an expert's or not, may be stored at a level; rows: 0 for any that fit."""
        if expert and self.expert_formats and not (level.format in self.expert_formats and level.symmetric):
            return False
        packed = (columns,) if level.symmetric else (columns, rows)
        if self.whole_words and level.format == "int" and any(n * level.bits % 32 for n in packed):
            return False
        whole = (level.group_size is None or columns % level.group_size == 0) and rows % FORMATS[level.format].tile == 0
        if level.name in self.also:
            return whole
        return (
            level.format in self.formats
            and (not self.bits or level.bits in self.bits)
            and (not self.group_sizes or level.group_size in self.group_sizes)
            and (not self.symmetric or level.format != "int" or level.symmetric in self.symmetric)
            and whole
            and (self.sums or level == level.base)
        )

    def nbytes(self, level: Level, rows: int, columns: int, itemsize: int) -> int:
        """Exact bytes of a weight [rows, columns] at a level; itemsize: of the model's numbers."""
        return LAYOUTS[self.layout].nbytes(level, rows, columns, itemsize)
