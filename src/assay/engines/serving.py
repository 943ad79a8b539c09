"""What engines take beside the weights while they serve: cache types with their flags, working memory, overhead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from assay.model.errors import InputError

GIB = 1 << 30


@dataclass(frozen=True)
class CacheType:
    """One way to store keys and values. bits: per element with its scales; setting: what the engine calls it; price: the
    level in the table of prices that stands for it."""

    name: str
    bits: Fraction
    setting: str
    price: str = "exact"


@dataclass(frozen=True)
class Server:
    """How an engine uses memory.

    packed: weights stay packed while it runs; at_once: tokens of prompts that it reads in one step; logits: rows of
    logits of one step, a token or a sequence each; page: tokens by which its cache grows; latent: whether
    it caches the latent vector of multi-head latent attention; overhead: bytes of everything else, and their basis;
    flags: the command-line options that keep it to this, {context}, {batch}, {total}, {cache} or {keys} and {values} filled
    in; alike: what must have one cache type, "all" keys and values of all layers, "sides" the keys of all layers and the
    values of all layers, "none"; embeds: whether a compressed embedding stays so; decoded: bytes for each element of the
    largest matrix, where it decodes matrices and caches while it runs.
    """

    packed: bool
    caches: tuple[CacheType, ...]
    at_once: int | None
    logits: str
    page: int
    latent: bool
    overhead: int
    basis: str
    flags: str
    alike: str = "all"
    embeds: bool = True
    decoded: int = 0

    def cache(self, name: str, engine: str) -> CacheType:
        """A cache type by name. Raises InputError naming what there is."""
        found = next((c for c in self.caches if c.name == name), None)
        if found is None:
            have = ", ".join(c.name for c in self.caches)
            raise InputError(f"--cache {name}: {engine} has {have}")
        return found


SERVERS: Mapping[str, Server] = {
    "vllm": Server(
        True,
        (CacheType("fp16", Fraction(16), "auto"), CacheType("fp8", Fraction(8), "fp8", "fp8")),
        2048, "sequence", 16, True, 3 * GIB // 2,
        "1.5 GiB: about 0.5 for the CUDA context and its libraries, 1.0 for captured graphs and workspaces; set, not measured",
        "--max-model-len {context} --max-num-seqs {batch} --max-num-batched-tokens 2048 --kv-cache-dtype {cache}",
    ),
    "llama.cpp": Server(
        True,
        (CacheType("fp16", Fraction(16), "f16"), CacheType("int8", Fraction(34, 4), "q8_0", "q8_0"),
         CacheType("int4", Fraction(18, 4), "q4_0", "q4_0")),
        512, "token", 256, True, GIB // 4,
        "0.25 GiB: program, tokenizer and buffers; set, not measured",
        "--ctx-size {total} --parallel {batch} --ubatch-size 512 --flash-attn on --cache-type-k {keys} --cache-type-v {values}",
        "sides",
    ),
    "transformers": Server(
        False,
        (CacheType("fp16", Fraction(16), ""),
         CacheType("int4", Fraction(9, 2), 'cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4}',
                   "quanto4")),
        None, "sequence", 1, False, GIB // 2,
        "0.5 GiB: Python, torch and transformers, 434 MiB measured (benchmarks/RESULTS.md, Memory)",
        "generate({cache})",
    ),
    "assay": Server(
        True, (CacheType("fp16", Fraction(16), ""),), None, "sequence", 1, False, GIB // 2,
        "0.5 GiB: Python, torch and transformers, 434 MiB measured (benchmarks/RESULTS.md, Memory)",
        "model = assay.load(OUT); {cache}model.generate(...)", "none", False, 8,
    ),
}  # fmt: skip
"""llama.cpp's q8_0 and q4_0 keep a 16-bit scale for 32 elements; quanto's int4 a 16-bit scale and shift for 64."""
ALIASES = {
    "plain": "transformers", "gguf": "llama.cpp", "llama.cpp-all": "llama.cpp",
    "awq": "vllm", "gptq": "vllm", "gptq-v2": "vllm", "vllm-w8a8": "vllm", "vllm-w8a8-static": "vllm",
}  # fmt: skip


def server(engine: str) -> Server:
    """How an engine uses memory. Raises InputError."""
    name = ALIASES.get(engine, engine)
    if name not in SERVERS:
        near = difflib.get_close_matches(name, SERVERS, 1)
        raise InputError(f"the memory of {engine!r} is not known; {f'did you mean {near[0]}?' if near else 'give --size'}")
    return SERVERS[name]
