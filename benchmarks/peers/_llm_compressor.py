"""What the two llm-compressor scripts share: its scheme, its data, its call."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from _common import Clock, Job, bits_in_blocks, block_linears, finish
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from llmcompressor import oneshot
from torch import Tensor, nn
from torch.utils.data import DataLoader


def scheme(job: Job) -> dict[str, Any]:
    """Modifier arguments: asymmetric integers in groups for every linear layer but the head."""
    weights = QuantizationArgs(
        num_bits=job.bits, type="int", strategy="group", group_size=job.group_size, symmetric=False
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return {"config_groups": groups, "ignore": ["lm_head"]}


def run(job: Job, peer: str, recipe: list[Any]) -> None:
    """Quantize in the model's own dtype. 16 bits of scale and a zero point of `bits` per group."""
    model, clock = job.load(), Clock()
    rows = [{"input_ids": ids[0], "attention_mask": ids[0] * 0 + 1} for ids in job.batches()]
    with clock.running():
        oneshot(model=model, recipe=recipe, dataset=DataLoader(rows, batch_size=1))
    decoded = {name: decode(linear) for name, linear in block_linears(model).items()}
    release = peer, version("llmcompressor")
    finish(job, clock, release, bits_in_blocks(job, 16 + job.bits), model, decoded)


def decode(linear: nn.Linear) -> Tensor:
    """Weight that its readers compute with: codes times scale, rounded once to the model's dtype.

    Some modifiers leave these in the layer, some the weights that are yet to be rounded.
    """
    scheme = linear.quantization_scheme.weights
    return fake_quantize(linear.weight, linear.weight_scale, linear.weight_zero_point, scheme)
