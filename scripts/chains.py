"""Writes docs/chains.md: method × family × format × reader, each chain run on a tiny random model.

    PYTHONPATH=src:tests python scripts/chains.py

A chain is compressed with `assay.compress`, which reads every file back, opened by a reader that people use, and its
logits are compared with those of the same weights decoded (`--to plain`) in stock transformers.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import WRITTEN
from tiny import save, text_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import assay
from assay import engines
from assay.engines.vllm_rules import problems
from assay.model.checkpoint import Checkpoint
from assay.model.errors import AssayError
from assay.model.sites import survey

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "chains.md"
IDS = torch.randint(1, 40, (2, 16), generator=torch.Generator().manual_seed(0))
STOCK, KERNELS, RULES = "transformers", "assay.load", "vLLM rules"
TOKENS = 1024
"""Enough for every expert of the tiny models."""
FAMILIES = tuple(f for f in WRITTEN if f not in ("bert", "vit"))
"""Those that read text and write logits of the next token."""
HEADER = ("family", "engine", "level", "method", "reader", "size", "difference")


@dataclass(frozen=True)
class Chain:
    """An engine with a level that it holds, the method that rounds, and who reads the result."""

    engine: str
    level: str
    method: str
    readers: tuple[str, ...]


CHAINS = (
    Chain("transformers", "int3-g32-asym", "two_sided", (STOCK, KERNELS)),
    Chain("transformers", "fp8-channel", "gptq", (STOCK, KERNELS)),
    Chain("vllm", "int4-g32-sym", "two_sided", (STOCK, KERNELS, RULES)),
    Chain("vllm", "fp8-channel", "gptq", (STOCK, KERNELS, RULES)),
    Chain("vllm", "nvfp4-g16", "gptq", (KERNELS, RULES)),
    Chain("vllm-w8a8", "int8-channel-sym", "two_sided", (KERNELS, RULES)),
    Chain("vllm-w8a8-static", "fp8-channel", "gptq", (KERNELS, RULES)),
    Chain("gptq", "int4-g32-sym", "two_sided", (KERNELS,)),
    Chain("gptq-v2", "int3-g32-asym", "two_sided", (KERNELS,)),
    Chain("awq", "int4-g32-asym", "two_sided", (KERNELS,)),
    Chain("assay", "nf4-g32", "gptq", (KERNELS,)),
    Chain("plain", "int4-g32-asym", "two_sided", (STOCK,)),
)
METHODS = (
    Chain("transformers", "int4-g32-asym", "nearest", (STOCK, KERNELS)),
    Chain("transformers", "int4-g32-asym", "clip", (STOCK, KERNELS)),
    Chain("transformers", "int4-g32-asym", "gptq", (STOCK, KERNELS)),
    Chain("transformers", "int4-g32-asym", "admm", (STOCK, KERNELS)),
    Chain("vllm", "int4-g32-sym", "sign_round", (STOCK, KERNELS, RULES)),
    Chain("gptq", "int4-g32-sym", "adaround", (KERNELS,)),
    Chain("assay", "trellis2-channel", "trellis", (KERNELS,)),
    Chain("assay", "vector2-channel", "vptq", (KERNELS,)),
    Chain("assay", "int3-g32-asym+rank4", "lorc", (KERNELS,)),
    Chain("assay", "int3-g32-asym+sparse0.01", "sparse_gptq", (KERNELS,)),
    Chain("assay", "planes4-g32", "bit_planes", (KERNELS,)),
    Chain("assay", "salient2.4-g32", "pb_llm", (KERNELS,)),
)
"""Further methods, on llama."""
_WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 64}
WIDE = {"llama": _WIDE, "qwen3": _WIDE, "qwen3_moe": _WIDE | {"moe_intermediate_size": 128}}
BLOCKS = (
    Chain("transformers", "tile8-g128", "two_sided", (STOCK, KERNELS)),
    Chain("vllm-w8a8", "tile8-g128", "two_sided", (KERNELS, RULES)),
    Chain("assay", "tile8-g128", "two_sided", (KERNELS,)),
)
"""FP8 with a scale for each block of 128 by 128 weights (`FP8_BLOCK`), for models `WIDE` enough to have a few."""
LIMITS = {STOCK: 0.0, KERNELS: 1e-5}
"""Largest difference of logits beside the largest logit, float32: decoded weights are exact, kernels sum in another order."""


def rows(
    families: Iterable[str], chains: Iterable[Chain], folder: Path, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> list[tuple[str, ...]]:  # fmt: skip
    """One row a chain and reader, by family; changes: settings by family. Raises RuntimeError where a reader differs by more
    than its limit."""
    found = []
    for family in families:
        home = folder / family
        home.mkdir(parents=True, exist_ok=True)
        model = home / "m" if (home / "m").exists() else save(family, home / "m", **(changes or {}).get(family, {}))
        for index, chain in enumerate(chains):
            found += _run(family, model, chain, home / f"{chain.engine}-{chain.method}-{index}")
    return found


def _run(family: str, model: Path, chain: Chain, out: Path) -> list[tuple[str, ...]]:
    start = (family, chain.engine, chain.level, chain.method)
    try:
        _compress(model, chain, out)
    except AssayError as error:
        return [(*start, "-", "-", _reason(error))]
    meant = _plain(out)
    size = f"{Checkpoint.open(out).weight_bytes / Checkpoint.open(model).weight_bytes:.3f}"
    opened = [reader for reader in chain.readers if chain.engine == "plain" or reader != STOCK or _stock_reads(model)]
    return [(*start, reader, size, _difference(out, reader, meant)) for reader in opened]


def _stock_reads(model: Path) -> bool:
    """Whether transformers is known to open compressed files of this family."""
    anatomy = survey(Checkpoint.open(model))
    experts = any(site.expert is not None for site in anatomy.sites.values())
    return engines.get("transformers").refusal(anatomy.family, experts) is None


def _compress(model: Path, chain: Chain, out: Path) -> None:
    options: dict[str, Any] = {"level": chain.level, "engine": chain.engine, "method": chain.method}
    options |= {"tokens": TOKENS, "window": 32}
    text = model.parent / "text.txt"
    assay.compress(model, out, calibration=text if text.exists() else text_file(model.parent), **options)


def _plain(out: Path) -> torch.Tensor:
    decoded = out.with_name(f"{out.name}-plain") if Checkpoint.open(out).levels else out
    if decoded != out:
        assay.export(out, "plain", decoded)
    return _logits(AutoModelForCausalLM.from_pretrained(decoded, dtype="auto", experts_implementation="eager"))


def _difference(out: Path, reader: str, meant: torch.Tensor) -> str:
    if reader == RULES:
        found = problems(Checkpoint.open(out))
        return found[0] if found else "fits"
    model = assay.load(out) if reader == KERNELS else AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    error = float((_logits(model) - meant).abs().max() / meant.abs().max())
    if not error <= LIMITS[reader]:
        raise RuntimeError(f"{out.name}: {reader} differs by {error:.2g}, more than {LIMITS[reader]:g}")
    return "exact" if LIMITS[reader] == 0 else f"below {LIMITS[reader]:g}"


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def _reason(error: Exception) -> str:
    text = re.sub(r"^nothing can be made smaller: ", "", str(error))
    return f"refused: {re.sub('; --engine plain simulates it$', '', text)}"


def page(main: list[tuple[str, ...]], methods: list[tuple[str, ...]], wide: list[tuple[str, ...]]) -> str:
    """The document."""
    every = main + methods + wide
    count = sum(row[-1] == "exact" or row[-1].startswith("below") for row in every)
    fitting = sum(row[-1] == "fits" for row in every)
    return (
        "# Chains\n\n"
        "Made by `scripts/chains.py`; `tests/test_chains.py` runs a part of it again. Every row was run: a tiny random model\n"
        "(float32) compressed with `assay compress`, which reads the files back, opened by the reader, and its logits compared\n"
        "with those of the decoded weights in stock transformers. `size` is that of the weight files beside the source's;\n"
        "headers weigh much in models this small. `difference` is the largest of the logits beside the largest logit.\n"
        "\n"
        "Readers: `transformers` is the stock library (decoded weights: exact); `assay.load` runs torch's kernels where it has\n"
        "them. `vLLM rules` is no reader: the files fit what vLLM 0.11 asks for as far as its sources tell\n"
        "(`engines/vllm_rules.py`); vLLM itself was not run.\n"
        "GPTQModel 7.7 has read the layouts gptq, gptq-v2 and awq (`benchmarks/peers/gptqmodel_reads.py`).\n\n"
        f"{count} chains work; {fitting} more fit the rules inferred for vLLM.\n\n"
        f"## Families\n\n{_table(main)}\n\n## Methods\n\n{_table(methods)}\n\n"
        f"## FP8 in blocks\n\n`--level FP8_BLOCK`, on models {_WIDE['hidden_size']} wide.\n\n{_table(wide)}\n"
    )


def _table(found: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, ("---",) * len(HEADER), *found])


def quiet() -> None:
    """No bars and warnings of the readers."""
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def main() -> None:
    """Run everything and write the page."""
    quiet()
    with tempfile.TemporaryDirectory() as work:
        found = rows(FAMILIES, CHAINS, Path(work))
        methods = rows(["llama"], METHODS, Path(work))
        PAGE.write_text(page(found, methods, rows(WIDE, BLOCKS, Path(work, "wide"), WIDE)), encoding="utf-8")


if __name__ == "__main__":
    main()
