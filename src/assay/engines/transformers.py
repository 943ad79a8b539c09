"""Stock transformers with compressed-tensors installed: `pack-quantized`, each layer at its own level."""

from assay.engines.contract import Contract

CONTRACT = Contract(
    name="transformers", layout="pack-quantized", since="transformers 5.0, compressed-tensors 0.13",
    bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128, None), symmetric=(False, True), head=True,
)  # fmt: skip
