"""llama.cpp: every block format of ggml, each tensor at its own, embedding and head too; experts of a kind alike.

A processor that reads one token at a time is bound by unpacking, not by memory. So plans keep to types that no finer one
of the same length of block outruns, and add slower ones only where a file could not be as small without
(benchmarks/GGUF.md).
"""

from assay.engines.contract import Contract
from assay.model.ggml import KINDS
from assay.model.gguf_layout import facts

FAST = ("q8_0", "q6_k", "q4_1", "q4_k", "q3_k", "q2_k")
SMALLER = ("iq4_nl", "iq2_s", "iq2_xs")
"""The fastest below the smallest of those, for rows of no whole blocks of 256 and for others."""
CONTRACT = Contract(
    name="llama.cpp", layout="gguf", since="llama.cpp b6000, llama-cpp-python 0.3.16",
    formats=tuple(kind for kind in KINDS if kind not in ("f16", "bf16")), head=True, embedding=True, experts=True,
    transposed=True, readable=tuple(facts()["families"]), experts_by_role=True, preferred=(FAST, FAST + SMALLER),
)  # fmt: skip
