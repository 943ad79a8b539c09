"""Stock transformers with compressed-tensors installed: `pack-quantized`, each layer at its own level.

transformers 5.23 reads such files wrongly: it refuses packed zero points, and with `dequantize=True` it
decodes every layer with the scheme of the first group. 5.18 to 5.22 read them exactly, but for three
kinds of model: falcon and mamba touch weights before they are decoded, and experts that are fused while
loading are left at random, without an error. compressed-tensors 0.20 fails on 4-bit zero points of 8 outputs or fewer.
"""

from assay.engines.contract import Contract

CONTRACT = Contract(
    name="transformers", layout="compressed-tensors", since="transformers 5.17 to 5.22, compressed-tensors 0.19",
    bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128, None), symmetric=(False, True),
    also=("fp8-channel", "tile8-g128", "nvfp4-g16", "mxfp4-g32", "mxfp8-g32"), head=True, least_outputs=9,
    unreadable=("falcon", "mamba"), reads_expert_models=False,
)  # fmt: skip
