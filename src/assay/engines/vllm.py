"""vLLM's weight-only kernels: 4 and 8 bits, FP8, NVFP4, layers that it fuses at one level, a layer's experts alike.

Inferred from vLLM's sources; vLLM was not run. compressed-tensors, by which it reads the format, has read it back.
"""

from assay.engines.contract import JOINED, Contract
from assay.engines.vllm_rules import problems

CONTRACT = Contract(
    name="vllm", layout="compressed-tensors", since="vllm 0.11 (inferred from its sources, not run)",
    bits=(4, 8), group_sizes=(32, 64, 128, None), symmetric=(True, False), also=("fp8-channel", "nvfp4-g16"),
    experts=True, least_outputs=9, whole_words=True, rules=problems, expert_formats=("int", "nvfp"),
    expert_names=("gate_proj", "up_proj", "down_proj"),
    fused=JOINED,
)  # fmt: skip
