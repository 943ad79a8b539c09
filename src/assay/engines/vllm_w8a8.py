"""vLLM with inputs rounded to 8 bits as well, a scale for each token while it runs: INT8 or FP8 weights, a scale a row
or, with --level FP8_BLOCK, a block of 128 by 128 weights.

What rounding the inputs costs is in neither the predicted nor the verified loss, which are those of the weights.
Inferred from vLLM's sources; vLLM was not run.
"""

from assay.engines.contract import JOINED, Contract
from assay.engines.vllm_rules import problems

CONTRACT = Contract(
    name="vllm-w8a8", layout="compressed-tensors-w8a8", since="vllm 0.11 (inferred from its sources, not run)",
    bits=(8,), group_sizes=(None,), symmetric=(True,), also=("fp8-channel", "tile8-g128"), experts=True,
    rules=problems, expert_names=("gate_proj", "up_proj", "down_proj"),
    fused=JOINED,
)  # fmt: skip
