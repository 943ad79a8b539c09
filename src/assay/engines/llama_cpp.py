"""llama.cpp: every block format of ggml, each tensor at its own, embedding and head too; experts of a kind alike."""

from assay.engines.contract import Contract
from assay.model.ggml import KINDS
from assay.model.gguf_layout import facts

CONTRACT = Contract(
    name="llama.cpp", layout="gguf", since="llama.cpp b6000, llama-cpp-python 0.3.16",
    formats=tuple(kind for kind in KINDS if kind not in ("f16", "bf16")), head=True, embedding=True, experts=True,
    transposed=True, readable=tuple(facts()["families"]), experts_by_role=True,
)  # fmt: skip
