"""GPTQ's layout, version 2, whose zero points are stored as they are; GPTQModel 7.7 was run; vLLM is inferred."""

from assay.engines.contract import JOINED, Contract

CONTRACT = Contract(
    name="gptq-v2", layout="gptq-v2", since="gptqmodel 7.7, vllm 0.11 (the latter inferred from its sources, not run)",
    bits=(2, 3, 4, 8), group_sizes=(32, 64, 128, None), symmetric=(False, True), experts=True, multiples=(32, 32),
    fused=JOINED,
)  # fmt: skip
