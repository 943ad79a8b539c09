"""Where the tensors of a Hugging Face model lie in a GGUF file, and how they are changed on the way; facts are data.

A GGUF tensor is one logical tensor of the checkpoint, or those of all experts stacked. Some have their rows in another
order: llama.cpp rotates neighbouring pairs of a head's channels where transformers rotates its two halves. Norms that
count from 1 have that 1 added, and Conv1D weights are turned to [out, in].
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from assay.model.errors import InputError


@dataclass(frozen=True)
class Target:
    """A tensor of a GGUF file.

    sources: logical names in the checkpoint, one, or one an expert; stacked: whether they are experts; heads: over which
    the rows are reordered, 0 for none; turned: whether the source is [in, out]; offset: what is added to the source;
    whole: kept in float32 always, because the reader wants that.
    """

    name: str
    sources: tuple[str, ...]
    stacked: bool = False
    heads: int = 0
    turned: bool = False
    offset: float = 0.0
    whole: bool = False

    def order(self, rows: int) -> Tensor | None:
        """Row of the source for each row of the target, int64 [rows]; None: the same."""
        if not self.heads:
            return None
        return torch.arange(rows).view(self.heads, 2, -1).transpose(1, 2).flatten()

    def forward(self, value: Tensor) -> Tensor:
        """What one source becomes; no dtype changes but where something is added, in float32."""
        value = value.T.contiguous() if self.turned and value.ndim == 2 else value
        order = self.order(len(value))
        value = value if order is None else value[order]
        return value.float() + self.offset if self.offset else value

    def backward(self, value: Tensor) -> Tensor:
        """Inverse of `forward`."""
        order = self.order(len(value))
        value = value if order is None else value[order.argsort()]
        value = value.float() - self.offset if self.offset else value
        return value.T.contiguous() if self.turned and value.ndim == 2 else value


@cache
def facts() -> dict[str, Any]:
    """The table of families, metadata and pre-tokenizers."""
    return json.loads(resources.files("assay.model.arch").joinpath("gguf.json").read_text(encoding="utf-8"))


def family(config: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a model's family. Raises InputError for one that no GGUF layout is known for, or settings it can't say."""
    kind = str(config.get("model_type"))
    table = facts()["families"]
    if kind not in table:
        near = difflib.get_close_matches(kind, table, 1)
        hint = f"did you mean {near[0]}? " if near and near[0] != kind else ""
        raise InputError(f"no GGUF layout is known for {kind} models; {hint}there are {', '.join(table)}")
    found = settings(config)
    for key, wanted in table[kind]["must"].items():
        value = found[str(wanted)[1:]] if str(wanted).startswith("=") else wanted
        if key in found and found[key] not in (value if isinstance(value, list) else [value]):
            raise InputError(f"llama.cpp's {kind} models have {key} {value}; this one has {found[key]}")
    _check_period(kind, table[kind], found)
    return table[kind]


def _check_period(kind: str, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    period = own.get("period")
    kinds = ["full_attention" if period and (i + 1) % period == 0 else "sliding_attention" for i in range(depth(found))]
    if period and found.get("layer_types", kinds) != kinds:
        raise InputError(f"llama.cpp's {kind} models attend fully in every {period}th layer; this one differs")


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json, those that are named otherwise or left out filled in."""
    own = facts()["families"].get(str(config.get("model_type")), {})
    found = dict(config)
    found |= {name: config[key] for key, name in own.get("alias", {}).items() if config.get(key) is not None}
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:
        found["rope_local_theta"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    width, heads = int(found["hidden_size"]), int(found["num_attention_heads"])
    found["rope"] = rope
    found["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    found["head_dim"] = found.get("head_dim") or width // heads
    found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
    found["intermediate_size"] = found.get("intermediate_size") or 4 * width
    found["partial_rotary_factor"] = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    found["rotary_dim"] = int(found["head_dim"] * found["partial_rotary_factor"])
    return found


def yarn_magnitude(factor: float) -> float:
    """What yarn scales queries and keys by, for positions stretched by a factor, where nothing else is asked for."""
    return 1 + 0.1 * math.log(factor)


def depth(config: Mapping[str, Any]) -> int:
    """Number of blocks."""
    return int(settings(config)["num_hidden_layers"])


def pairs(config: Mapping[str, Any]) -> Iterator[tuple[str, Target]]:
    """Every tensor that a model of this config may have: its logical name, and the GGUF tensor of that one source."""
    own, found, tables = family(config), settings(config), facts()["tables"]
    layers, experts = own.get("layers", "model.layers"), int(found.get(own.get("experts", ""), 0))
    for name, gguf in _merged(tables, own["outer"]).items():
        yield from _with_suffixes(name, name, gguf, own, found)
    for block in range(depth(config)):
        for stem, gguf in _merged(tables, own["block"]).items():
            for e in range(experts) if "{e}" in stem else [0]:
                name = f"{layers}.{block}.{stem.format(e=e)}"
                yield from _with_suffixes(name, stem, f"blk.{block}.{gguf}", own, found)


def _merged(tables: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    return {k: v for name in names for k, v in tables[name].items()}


def _with_suffixes(
    name: str, stem: str, gguf: str, own: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[tuple[str, Target]]:
    for suffix in ("weight", "bias"):
        yield f"{name}.{suffix}", Target(
            f"{gguf}.{suffix}", (f"{name}.{suffix}",), "{e}" in stem, int(found.get(own.get("heads", {}).get(stem, ""), 0)),
            stem in own.get("turned", ()), float(own.get("norm_offset", 0)) if "norm" in gguf else 0.0,
            gguf.rpartition(".")[2] in facts()["whole"],
        )  # fmt: skip


def targets(config: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Target], dict[str, str]]:
    """GGUF tensors by name for the logical tensors of a checkpoint, and why others are left out.

    Raises InputError for a tensor that the family's layout has no place for.
    """
    own, known = family(config), dict(pairs(config))
    found: dict[str, Target] = {}
    dropped: dict[str, str] = {}
    for name in names:
        full = name if name in known else own.get("prefix", "model.") + name
        if any(name.endswith(end) for end in facts()["remade"]):
            dropped[name] = "llama.cpp makes it itself"
        elif full not in known:
            raise InputError(f"{name} has no place in llama.cpp's {own['arch']} models; remove it, or use --engine assay")
        elif known[full].name == "output.weight" and config.get("tie_word_embeddings"):
            dropped[name] = "the same as the embedding"
        else:
            target = known[full]
            earlier = found[target.name].sources if target.name in found else ()
            found[target.name] = Target(**(vars(target) | {"sources": (*earlier, name)}))
    return {name: _in_order(target) for name, target in found.items()}, dropped


def _in_order(target: Target) -> Target:
    """Experts by number, not by name."""

    def number(name: str) -> int:
        return next((int(p) for p in reversed(name.split(".")) if p.isdecimal()), 0)

    return Target(**(vars(target) | {"sources": tuple(sorted(target.sources, key=number))})) if target.stacked else target
