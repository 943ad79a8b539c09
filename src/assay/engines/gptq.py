"""GPTQ's layout, version 1: symmetric integers, which vLLM, SGLang, transformers with GPTQModel and GPTQModel itself read.

GPTQModel 7.7 was run, the others were not; what is said of vLLM is inferred from its sources. Its fast kernels take 4 and
8 bits; 2 and 3 bits run in GPTQModel. Scales of 16 bits are what all of them load.
"""

from assay.engines.contract import JOINED, Contract

CONTRACT = Contract(
    name="gptq", layout="gptq", since="gptqmodel 7.7, vllm 0.10 (the latter inferred from its sources, not run)",
    bits=(2, 3, 4, 8), group_sizes=(32, 64, 128, None), symmetric=(True,), experts=True, multiples=(32, 32),
    fused=JOINED,
)  # fmt: skip
