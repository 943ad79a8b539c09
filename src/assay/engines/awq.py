"""AWQ's layout (version gemm): 4 bits with zero points, one level for the whole model.

vLLM, SGLang and GPTQModel read it; GPTQModel 7.7 was run, the others were not.
"""

from assay.engines.contract import JOINED, Contract

CONTRACT = Contract(
    name="awq", layout="awq", since="gptqmodel 7.7, vllm 0.10 (the latter inferred from its sources, not run)",
    bits=(4,), group_sizes=(32, 64, 128, None), symmetric=(False,), experts=True, multiples=(8, 8), one_level=True,
    fused=JOINED,
)  # fmt: skip
