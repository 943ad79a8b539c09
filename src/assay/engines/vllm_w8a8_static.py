"""vLLM with inputs rounded to 8 bits by scales from the calibration text, one a layer: nothing to find out while it runs.

A larger input than any of that text is cut off. Experts are left out: their kernels want one scale of the weights as
well. Inferred from vLLM's sources; vLLM was not run.
"""

from dataclasses import replace

from assay.engines import vllm_w8a8

CONTRACT = replace(
    vllm_w8a8.CONTRACT, name="vllm-w8a8-static", layout="compressed-tensors-w8a8-static", also=("fp8-channel",), experts=False
)
